"""The endpoint on Ray Serve: one Generator per replica, on a whole GPU, a share of one, or CPUs. Needs the extra "ray".

    serve run examples/serving/ray_serve.yaml

The config file names `build`. The deployment options set here are defaults, which its `deployments:` override.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray import serve

from ragturbo.config import GeneratorConfig
from ragturbo.serve.config import ServeConfig, keys_from_environment

NAME = "images"
# Ray's request limits, as a multiple of what a replica holds: a refusal takes only a millisecond or two.
OVERCOMMIT = 16


class Images:
    """The deployment class. Ray Serve sets `app` and calls `check_health`."""

    app: Any

    async def check_health(self) -> None:
        """Raise if the device is lost: only a new process can use it again."""
        service = self.app.state.service
        if not service.alive:
            raise RuntimeError(f"the replica cannot recover: {service.status}")


def build(args: Mapping[str, Any]) -> serve.Application:
    """Build the Ray Serve application from fields of ServeConfig, and `num_replicas` to turn autoscaling off."""
    settings = dict(args)
    replicas = settings.pop("num_replicas", None)
    config = ServeConfig.from_dict(settings)
    generator = GeneratorConfig(**config.options)
    batch = generator.batch_sizes[-1]
    limit = OVERCOMMIT * (generator.max_queue + batch)
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 1} if config.device == "cpu" else {"num_cpus": 1, "num_gpus": 1},
        # Far more than a replica holds: it refuses the rest at once with Retry-After. Requests over Ray's limit would
        # wait in its router, where no deadline applies.
        "max_ongoing_requests": limit,
        # A burst passes through this queue too and must not be refused by it. Ray answers the rest with 503.
        "max_queued_requests": limit,
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": config.timeout + 5,
    }
    if replicas is None:
        # More than one full batch in flight per replica means that requests wait.
        options["autoscaling_config"] = {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": batch}
    else:
        options["num_replicas"] = replicas

    def application() -> Any:
        """Create the app on the replica. Ray counts the replica as ready once it has started, so it is warm then."""
        from ragturbo.serve.app import create_app

        # Keys come from each node's environment, so that they need not be in the config file.
        clients, admins = keys_from_environment()
        own = replace(config, api_keys=config.api_keys or clients, admin_keys=config.admin_keys or admins)
        return create_app(own, background=False)

    return serve.deployment(name=NAME, **options)(serve.ingress(application)(Images)).bind()
