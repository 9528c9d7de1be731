"""Reads KVM's counters and traces from the kernel; has never heard of Prometheus.

::

       kvm/bpf           stats fds          debugfs            kvm:kvm_exit of armed threads
           \\                |                /                             |
            `------- kvm/counters/*.py ------'                    kvm/perf/notify_tracer.py
                             |                                              |
        kvm/host     kvm/snapshot.py     kvm/discovery, kvm/identity        |
             \\___________   |   ______________/                             |
                          Snapshot                                     NotifyExit
      -----------------------|-----------------------------------------------|--------  only these two cross
                             |                          exporter/monitor -> exporter/stalls
                             |                                              |  verdicts
                             '------> exporter/prometheus, status_page <----'
                                                   |
                                             exporter/web  ->  /metrics, /

One direction: a package imports only from those nearer to the kernel (``tests/test_architecture.py``).
"""
