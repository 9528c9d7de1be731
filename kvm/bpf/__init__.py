"""The eBPF programs and how they are loaded; the only user of libbpf."""
