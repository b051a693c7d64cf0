"""Three ways to learn behind one protocol: by gradient, by growth, by memory.

A *trainer* knows how a model learns from batches, how many epochs that takes, and what an epoch
yields. It knows no model by name; a model names its trainer (`training`).
"""

from run_folder import TrainingError
from trainers.gradient import GradientTrainer, build_optimizer, build_scheduler, compile_model
from trainers.growth import GrowthTrainer
from trainers.memory import MemoryTrainer
from trainers.trainer import Trainer

__all__ = [
    "TRAINERS",
    "GradientTrainer",
    "GrowthTrainer",
    "MemoryTrainer",
    "Trainer",
    "TrainingError",
    "build_optimizer",
    "build_scheduler",
    "compile_model",
]


TRAINERS: dict[str, type[Trainer]] = {
    "gradient": GradientTrainer,
    "growth": GrowthTrainer,
    "memory": MemoryTrainer,
}
