"""Losses: pure functions of tensors, one file per objective."""

from lightning_dd.losses.cam import attention_map, class_activation_map, normalise_maps
from lightning_dd.losses.coresets import herding, k_center
from lightning_dd.losses.gradients import SteadyShare, attach_gradients
from lightning_dd.losses.krr import (
    averaged_kernel,
    centred_one_hot,
    half_squared_error,
    initial_labels,
    krr_predict,
    label_margin,
    label_margin_loss,
    scaled_cross_entropy,
)
from lightning_dd.losses.labels import loss_name, student_loss
from lightning_dd.losses.matching import (
    StatisticsDistance,
    class_characteristic_distance,
    class_mean_distance,
    class_mmd,
    gradient_distance,
)
from lightning_dd.losses.meta_features import (
    focus_weights,
    map_entropy,
    map_variance,
    meta_partition,
    positivity,
    shared_map,
)
from lightning_dd.losses.metadd import (
    MetaOptions,
    agreement_kl,
    architecture_cross_entropy,
    ensemble_logits,
    label_distribution,
    metadd_loss,
    prediction_logits,
)
from lightning_dd.losses.metadd_gradient import Architecture, gathered_loss, naive_loss
from lightning_dd.losses.trajectory import constant_memory, functional_loss, trajectory_loss, unrolled

__all__ = [
    "Architecture",
    "MetaOptions",
    "StatisticsDistance",
    "SteadyShare",
    "agreement_kl",
    "architecture_cross_entropy",
    "attach_gradients",
    "attention_map",
    "averaged_kernel",
    "centred_one_hot",
    "class_activation_map",
    "class_characteristic_distance",
    "class_mean_distance",
    "class_mmd",
    "constant_memory",
    "ensemble_logits",
    "focus_weights",
    "functional_loss",
    "gathered_loss",
    "gradient_distance",
    "half_squared_error",
    "herding",
    "initial_labels",
    "k_center",
    "krr_predict",
    "label_distribution",
    "label_margin",
    "label_margin_loss",
    "loss_name",
    "map_entropy",
    "map_variance",
    "meta_partition",
    "metadd_loss",
    "naive_loss",
    "normalise_maps",
    "positivity",
    "prediction_logits",
    "scaled_cross_entropy",
    "shared_map",
    "student_loss",
    "trajectory_loss",
    "unrolled",
]
