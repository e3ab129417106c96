"""How every public name of poise.medical is called under changed arguments, or why it is not."""

import torch
from torch import Tensor

from poise.core.testing import Exempt, Fuzz, randn, sampled, valid
from poise.medical import (
    ABMIL,
    DSMIL,
    AttentionEntropyLoss,
    GatedAttention,
    TransMIL,
    attention_entropy,
    bag_metrics,
    fit_iou_curve,
    image_accuracy,
    memorization_epoch,
    multiscale_consistency,
    picture_tiles,
    tile_grid,
)

RECORD = Exempt("a record of what was found; it computes nothing")
DATA = Exempt("reads a data set, or describes one")
BASE = Exempt("a base class or protocol; what implements it is called")
LOOP = Exempt("drives the training of models; the losses in it are called by themselves")
WRAPPER = Exempt("wraps a network of another library; test_aem_models.py tests what it refuses")
MASKS = Exempt("changes masks of labels by morphology; test_adele_correction.py tests what it refuses")
DRAWN = Exempt("draws a figure")

HALF = "batch statistics of equal images are more than the gradients of a network all in float16 can hold"
CLASS = "whether a label is one of fewer classes is known on the device only; PyTorch says so there"
FLAT = {"zeros": HALF, "equal": HALF, "tiny": HALF}
MASKED = "what the mask leaves out takes no part"


def _bags(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (randn(generator, 2, 6, 4),)


def _consistency(small: Tensor, base: Tensor, large: Tensor, gate: float) -> Tensor:
    return multiscale_consistency([small, base, large], gate=gate)[0]


def _curve(generator: torch.Generator) -> tuple[Tensor, ...]:
    epochs = torch.arange(1, 9, dtype=torch.float64)
    return 0.8 * (1 - torch.exp(-0.5 * epochs)), epochs


FUZZ: dict[str, Fuzz | Exempt] = {
    "BreaKHis": DATA,
    "Micrograph": DATA,
    "image_accuracy": valid(lambda: image_accuracy, lambda g: (torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))),
    "patient_accuracy": Exempt("takes the names of patients; test_shisrcnet_data.py tests what it refuses"),
    "Fidelity": RECORD,
    "degrade": sampled("shisrcnet/degrade", nan="a pixel between the pixels that are kept has no weight"),
    "enlarge": sampled("shisrcnet/enlarge"),
    "evaluate_sr": LOOP,
    "MFEBlock": sampled("shisrcnet/mfe_block"),
    "Classifier": BASE,
    "ClassifierCF": sampled("shisrcnet/network", **FLAT),
    "WithFeatures": BASE,
    "CrossScalePyramid": sampled("shisrcnet/pyramid", **FLAT),
    "CSFBlock": sampled("shisrcnet/csf_block"),
    "SHISRCLoss": sampled("shisrcnet/loss", resized=CLASS, shortened=CLASS),
    "SHISRCNet": sampled("shisrcnet/network", **FLAT),
    "SHISRCOutput": RECORD,
    "SKConv": sampled("shisrcnet/sk_conv"),
    "SKNet26": Exempt("a stack of SKUnit, which is called"),
    "SKUnit": sampled("shisrcnet/sk_unit"),
    "SRResNetMFE": sampled("shisrcnet/super_resolution"),
    "ABMIL": valid(lambda: ABMIL(4, 6, 2, att_dim=5).double(), _bags, (0,)),
    "AttentionEntropyLoss": valid(lambda: AttentionEntropyLoss(0.7), lambda g: (randn(g, 2, 3, 6),), (0,)),
    "attention_entropy": valid(lambda: attention_entropy, lambda g: (randn(g, 2, 3, 6),), (0,)),
    "GatedAttention": valid(lambda: GatedAttention(4, 5).double(), _bags, (0,)),
    "QueryAttention": sampled("aem/query_attention", nan=MASKED),
    "Bag": RECORD,
    "BagBatch": RECORD,
    "Subsample": sampled("aem/subsample", nan="an instance may be left out"),
    "collate_bags": Exempt("takes bags, not tensors; test_aem_bags.py tests what it refuses"),
    "DSMIL": valid(lambda: DSMIL(4, 2, att_dim=5).double(), _bags, (0,)),
    "FromMONAI": WRAPPER,
    "FromTorchmil": WRAPPER,
    "FeatureBagDataset": DATA,
    "slides_of_h5": DATA,
    "heat_map": DRAWN,
    "tile_grid": valid(lambda: tile_grid, lambda g: (randn(g, 4), torch.tensor([[0, 0], [0, 8], [8, 0], [8, 8]]), 8)),
    "BagModel": BASE,
    "Reading": RECORD,
    "Slide": DATA,
    "Slides": DATA,
    "check_patients": DATA,
    "read_slides": DATA,
    "split_patients": DATA,
    "EfficientNetLite0": Exempt("reads weights that a package bundles"),
    "picture_tiles": valid(
        lambda: picture_tiles, lambda g: (randn(g, 3, 12, 12), 8, 4), nan="a pixel beyond the last whole tile"
    ),
    "BagMetrics": RECORD,
    "MILTrainer": LOOP,
    "bag_metrics": valid(lambda: bag_metrics, lambda g: (randn(g, 6, 2), torch.tensor([0, 1, 0, 1, 1, 0]))),
    "TransMIL": valid(lambda: TransMIL(4, 8, 2, heads=2, dropout=0.0).double(), _bags, (0,)),
    "SlideTiles": DATA,
    "Tile": DATA,
    "extract_features": DATA,
    "AdeleLoss": sampled("adele/loss"),
    "MultiscaleConsistency": sampled("adele/consistency"),
    "multiscale_consistency": valid(
        lambda: _consistency, lambda g: (*(randn(g, 2, 3, 3, 4) for _ in range(3)), 0.0), (0, 1, 2)
    ),
    "MEDICAL": Exempt("a setting of correct_labels, which is called"),
    "PASCAL": Exempt("a setting of correct_labels, which is called"),
    "Correction": Exempt("the settings of correct_labels, which is called"),
    "correct_labels": sampled("adele/correction"),
    "IoUCurve": RECORD,
    "fit_iou_curve": valid(lambda: fit_iou_curve, _curve),
    "memorization_epoch": valid(lambda: memorization_epoch, lambda g: (_curve(g)[0], 20)),
    "MemorizationDetector": LOOP,
    "StreamingIoU": Exempt("counts masks of labels; test_adele_detection.py tests what it refuses"),
    "LabelStore": DATA,
    "multiscale_forward": sampled("adele/forward"),
    "multiscale_probabilities": sampled("adele/probabilities"),
    "AdeleTrainer": LOOP,
    "CorrectionSchedule": LOOP,
    "random_under_over": MASKS,
    "under_over_segment": MASKS,
    "SegTHORSlices": DATA,
    "VOCCrops": DATA,
    "VOCPseudoLabels": DATA,
}
