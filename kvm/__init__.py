"""Reads KVM's counters and traces from the kernel; has never heard of Prometheus.

::

       eBPF iterator        stats fds        debugfs            kvm:kvm_exit of armed threads
            \\                   |               /                           |
             `--------- kvm/sources/*.py --------'                 kvm/notify_trace.py
                              |                                             |
       kvm/host.py   kvm/snapshot.py   kvm/owners.py                        |
              \\____________   |   ______________/                           |
                           Snapshot                                    NotifyExit
      ------------------------|-----------------------------------------------|--------  only these two cross
                              |                                        exporter/watch.py -> progress.py -> stall_log.py
                              '----------> exporter/collector.py <------------'  verdicts
                                                  |
                                          exporter/server.py  ->  /metrics, /

One direction: a module imports only from those nearer to the kernel (``tests/test_architecture.py``).
"""
