"""What this host is and what this process may do on it: CPU facts, lockdown, privileges, /dev/kvm."""
