"""A LeRobot policy as a server of the OpenPI protocol, in a process of LeRobot's own environment.

`server` and `policy` run in LeRobot's environment, which has another torch; `process` and `client`
run in ours. Import from the modules: this file imports nothing.
"""
