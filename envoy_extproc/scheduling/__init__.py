"""Choosing an endpoint: pure and synchronous. Data comes in as `Candidate`s, chance as a `random.Random`.

`pool` says who may be chosen at all, a `Profile` filters, scores and picks among them, `registry` names the profiles.
"""
