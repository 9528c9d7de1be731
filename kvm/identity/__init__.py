"""Whose VM it is, which id it has, and which number each vCPU has."""
