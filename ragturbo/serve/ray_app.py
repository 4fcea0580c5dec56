"""The endpoint on Ray Serve: one Generator a replica, on whole GPUs, shares of them, or CPUs. Needs the extra "ray".

    serve run examples/serving/ray_serve.yaml

`build` is what the config file names. What it sets here are defaults: the file's `deployments:` overrides them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve

from ragturbo.config import GeneratorConfig
from ragturbo.serve.config import ServeConfig, keys_from_environment

NAME = "images"
# Times what a replica can hold. A refusal takes a millisecond or two: even at many times the capacity there are few.
MANY = 16


class Images:
    """Ray makes its replicas of this, and asks each how it is; the rest is the application's own."""

    app: Any

    async def check_health(self) -> None:
        """A replica whose device is lost is replaced by a new process, which is the only cure."""
        service = self.app.state.service
        if not service.alive:
            raise RuntimeError(f"this replica is of no use any more: {service.status}")


def build(args: Mapping[str, Any]) -> serve.Application:
    """args: the fields of ServeConfig (model, database, options, timeout …), and num_replicas for a fixed number."""
    settings = dict(args)
    replicas = settings.pop("num_replicas", None)
    config = ServeConfig.of(settings)
    generator = GeneratorConfig(**config.options)
    batch = generator.batch_sizes[-1]
    held = generator.max_queue + batch
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 1} if config.device == "cpu" else {"num_cpus": 1, "num_gpus": 1},
        # Far more than a replica holds: it refuses the rest itself, at once and with Retry-After. What Ray kept back
        # would wait in its router, where no deadline counts.
        "max_ongoing_requests": MANY * held,
        # Bounded, for where no replica can be asked; Ray answers the rest with 503. A burst passes through this queue
        # too, and must not be refused by it.
        "max_queued_requests": MANY * held,
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": config.timeout + 5,
    }
    if replicas is None:
        # More than a batch in flight at every replica: they are full, and another one would help.
        options["autoscaling_config"] = {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": batch}
    else:
        options["num_replicas"] = replicas

    def application() -> Any:
        """On the replica: Ray counts it in when this application has started, and that includes warming up."""
        from dataclasses import replace

        from ragturbo.serve.app import create_app

        # Keys come from the node's own environment, not from a file that travels through the cluster.
        clients, admins = keys_from_environment()
        own = replace(config, api_keys=config.api_keys or clients, admin_keys=config.admin_keys or admins)
        return create_app(own, background=False)

    deployment = serve.deployment(name=NAME, **options)(serve.ingress(application)(Images))
    return deployment.bind()
