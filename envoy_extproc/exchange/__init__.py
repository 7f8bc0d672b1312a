"""The core: one HTTP exchange as a table of states. Events in, commands out; no I/O, no clock, no gRPC.

`events` is what can happen, `commands` what is to be done about it, `report` what is left when it is over.
"""
