"""Agents that are blind, where no lockdown is in force."""
