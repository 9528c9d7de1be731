"""Ways to be blind times surfaces: whatever the agent cannot see, no surface may show it as all-clear.

`ways.py` has the ways, `surfaces.py` asks every surface, `claims.py` finds what a surface claims and a run as root
beside it does not confirm.
"""
