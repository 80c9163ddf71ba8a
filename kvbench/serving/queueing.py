"""The queue before the servers, as a discrete-event simulation (simpy)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from kvbench.contract.extras import need

if TYPE_CHECKING:
    import simpy


def waiting_times(arrivals: Sequence[float], busy: Sequence[float], servers: int) -> list[float]:
    """Seconds that each request waits for one of the servers, first come, first served.

    `arrivals` in order, seconds; `busy`, the seconds that its server is taken. A server has one request at a time.
    """
    queueing = need("simpy", "kvbench trace")
    environment = queueing.Environment()
    resource = queueing.Resource(environment, capacity=servers)
    waited = [0.0] * len(arrivals)

    def request(place: int) -> Generator[simpy.Event, Any, None]:
        with resource.request() as turn:
            yield turn
            waited[place] = environment.now - arrivals[place]
            yield environment.timeout(busy[place])

    def source() -> Generator[simpy.Event, Any, None]:
        for place, at in enumerate(arrivals):
            yield environment.timeout(max(at - environment.now, 0.0))
            environment.process(request(place))

    environment.process(source())
    environment.run()
    return [max(seconds, 0.0) for seconds in waited]
