"""What installs the agent on a host or a cluster, and the program that makes packages of it: ``python -m deploy``."""
