"""The verl plugin: importing this module registers PowerFlow with verl. verl does so itself (entry point verl.plugins).

It registers, each under the name "powerflow", a trainer (``trainer.v1.trainer_mode``), a policy loss
(``actor.policy_loss.loss_mode``) and an advantage estimator that only says that it wants that trainer
(``algorithm.adv_estimator``); and the fused-kernel backend "powerflow_fast". docs/verl.md has the rest.
"""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import verl

from ..errors import ConfigError
from .verl_settings import NAME

__all__ = ["SUPPORTED_VERL", "check_version", "register", "wants_powerflow_trainer"]

SUPPORTED_VERL = "0.9.1"
"""The one release that this plugin was written for: it overrides and wraps functions of verl that aren't public."""


def check_version(version: str) -> None:
    """Raise ImportError if ``version`` of verl is another than the supported one."""
    if version != SUPPORTED_VERL:
        raise ImportError(f"powerflow_fast.integrations.verl: verl must be {SUPPORTED_VERL}, got {version}")


def wants_powerflow_trainer(**_: Any) -> NoReturn:
    """The advantage estimator "powerflow", reached by a run with another trainer: PowerFlow's makes the targets."""
    raise ConfigError(
        f"trainer.v1.trainer_mode must be {NAME!r} with algorithm.adv_estimator={NAME}: "
        "its targets need the reference log-probs, which verl hands to no advantage estimator"
    )


def register() -> None:
    """Register trainer, loss, estimator and fused backend. A second call changes nothing."""
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
    from verl.trainer.ppo.v1 import register_trainer

    from .verl_fused import install
    from .verl_loss import powerflow_loss
    from .verl_trainer import PowerFlowTrainer

    register_trainer(NAME)(PowerFlowTrainer)
    register_policy_loss(NAME)(powerflow_loss)
    register_adv_est(NAME)(wants_powerflow_trainer)
    install()


try:
    check_version(verl.__version__)
    register()
except Exception as error:
    # verl catches what a plugin raises and reports it at DEBUG, where nobody looks
    logging.getLogger(__name__).warning("PowerFlow isn't registered with verl: %s", error)
    raise
