"""The table of ``top``: what all VMs do now, by the rate of any statistic; pure, but for the thread that reads."""
