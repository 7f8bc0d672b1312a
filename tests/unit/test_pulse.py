"""A loop that comes to its work at once, and one that does not."""

from __future__ import annotations

import asyncio
import time

from envoy_extproc.server.pulse import Pulse
from tests.support.gateway import eventually


async def test_a_loop_with_nothing_to_do_is_prompt_soon() -> None:
    pulse = Pulse()
    assert not pulse.prompt
    pulse.start()
    assert not pulse.prompt
    await eventually(lambda: pulse.prompt)
    pulse.stop()
    assert not pulse.prompt


async def test_one_that_was_kept_from_its_work_is_not_until_it_has_caught_up() -> None:
    pulse = Pulse()
    pulse.start()
    await eventually(lambda: pulse.prompt)
    time.sleep(0.05)  # noqa: ASYNC251  what keeps it
    assert not pulse.prompt  # before its next beat
    await asyncio.sleep(0.001)
    assert not pulse.prompt  # and behind it
    await eventually(lambda: pulse.prompt)
    pulse.stop()


async def test_it_beats_while_anybody_asks() -> None:
    pulse = Pulse()
    pulse.start()
    pulse.start()
    await eventually(lambda: pulse.prompt)
    pulse.stop()
    await asyncio.sleep(0.05)
    await eventually(lambda: pulse.prompt)
    pulse.stop()
    await asyncio.sleep(0.05)
    assert not pulse.prompt


async def test_of_an_earlier_time_nothing_is_remembered() -> None:
    pulse = Pulse()
    pulse.start()
    await eventually(lambda: pulse.prompt)
    pulse.stop()
    pulse.start()
    assert not pulse.prompt
    pulse.stop()
