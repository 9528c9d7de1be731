"""On a Debian where the package was installed (tests/deploy/test_machine.py): the agent as systemd runs it."""
