"""Adversarially trained classifier on planted features: robustness with a known answer."""

from modules.planted.module import PlantedClassifier

__all__ = ["PlantedClassifier"]
