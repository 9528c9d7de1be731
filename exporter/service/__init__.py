"""What the agent and whoever runs it as a service have to tell each other: systemd's protocols, without its library."""
