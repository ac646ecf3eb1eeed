"""PSD-PSRO: policy-space response oracles with policy space diversity (Yao et al. 2023), and their relatives."""

from modules.psd_psro.diversity import (
    Anneal,
    BehaviourResponseDiversity,
    Constant,
    ExpectedCardinality,
    NoDiversity,
    PolicySpaceDiversity,
    Sigmoid,
)
from modules.psd_psro.module import PSDPSRO
from modules.psd_psro.neural_oracle import NeuralOracle
from modules.psd_psro.oracles import ExactResponse, GradientResponse
from modules.psd_psro.sampled import SampledPSRO
from modules.psd_psro.schemes import Anytime, ExtensiveFormOracle, Pipeline, Rectified, Sequential

__all__ = [
    "PSDPSRO",
    "Anneal",
    "Anytime",
    "BehaviourResponseDiversity",
    "Constant",
    "ExactResponse",
    "ExpectedCardinality",
    "ExtensiveFormOracle",
    "GradientResponse",
    "NeuralOracle",
    "NoDiversity",
    "Pipeline",
    "PolicySpaceDiversity",
    "Rectified",
    "SampledPSRO",
    "Sequential",
    "Sigmoid",
]
