"""The AEM experiment: every preset trains, reads the published formats, and resumes bit-identically."""

from dataclasses import replace
from functools import partial

import h5py
import numpy as np
import pytest
import torch

from poise.core.data.wheels import MissingDataError, wheel_file
from poise.core.lab import Run
from poise.core.lab.errors import BadInput
from poise.core.lab.rehearsal import check_resume, figures, rehearse
from poise.medical import EfficientNetLite0
from poise.medical.experiments import aem as experiment
from poise.medical.experiments.aem import EXPERIMENT, SETUPS
from poise.medical.experiments.aem_data import digit_bags
from poise.medical.experiments.aem_measures import correlation, ranking
from poise.medical.mil.tiles import WEIGHTS

TINY = {"train": 4, "test": 6, "hidden": 16, "att_dim": 8, "epochs": 6}
QUICK = replace(EXPERIMENT.presets["quick"], **TINY)
MEASURES = {"auc", "accuracy", "macro_f1", "nll", "entropy", "largest_weight", "epochs_correlation"}
train = partial(rehearse, EXPERIMENT)


def test_every_arm_trains_and_all_are_compared(tmp_path):
    results = {arm: train(QUICK, arm, tmp_path) for arm in SETUPS}
    assert all(result.metrics.keys() == MEASURES | {"attention_auc"} for result in results.values())
    for claim in EXPERIMENT.claims:
        assert claim.metric in results[claim.arm].metrics
    EXPERIMENT.compare(QUICK, results, Run.scratch(tmp_path / "compare"))
    assert figures(tmp_path / "compare") == {"arms.png", "bags.png", "entropy_and_auc.png", "models.png"}


def test_compare_draws_whatever_arms_ran(tmp_path):
    EXPERIMENT.compare(QUICK, {"aem": train(QUICK, "aem", tmp_path)}, Run.scratch(tmp_path / "compare"))
    assert figures(tmp_path / "compare") == {"arms.png", "bags.png"}


def test_arms_of_a_seed_share_bags_and_start(tmp_path):
    still = replace(QUICK, learning_rate=0.0, epochs=1)
    one, two = (train(still, arm, tmp_path).load("bag") for arm in ("baseline", "aem"))
    assert all(torch.equal(one[name], two[name]) for name in ("weights", "pictures", "truth"))
    other = train(still, "baseline", tmp_path / "other", seed=1).load("bag")
    assert not torch.equal(one["pictures"], other["pictures"])


def test_bags_of_digits_are_positive_when_they_hold_nines():
    split = digit_bags(0, 20, 30, 30, (2, 5))
    assert split.truth.shape == (30, 30)
    for index in range(30):
        nines = int(split.truth[index].sum())
        assert 2 <= nines <= 5 if split.test[index].label else nines == 0
    features = torch.cat([bag.features for bag in split.train])
    assert features.shape == (600, 32)
    assert features.std(0).mean().item() == pytest.approx(1, abs=0.1)
    train_rows = {tuple(row) for row in features.tolist()}
    assert not train_rows & {tuple(row) for bag in split.test for row in bag.features.tolist()}


def test_ranking_is_the_share_of_pairs_in_the_right_order():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 12, generator=generator)
    truth = torch.rand(5, 12, generator=generator) < 0.4
    expected = [roc_auc_score(one, other) for one, other in zip(truth, weights, strict=True)]
    assert ranking(weights, truth).tolist() == pytest.approx(expected)


def test_correlation_is_that_of_ranks():
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    entropy = torch.randn(25, generator=generator, dtype=torch.float64)
    auc = torch.randint(5, (25,), generator=generator).double()
    assert correlation({"entropy": entropy, "auc": auc}) == pytest.approx(spearmanr(entropy[4:], auc[4:]).statistic)
    assert correlation({"entropy": entropy, "auc": torch.ones(25)}) == 0


@pytest.mark.parametrize("arm", ["subsampled_aem", "annealed"])
def test_an_interrupted_run_resumes_bit_identically(arm, tmp_path):
    config = replace(QUICK, train=3, epochs=4)
    check_resume(EXPERIMENT, config, arm, tmp_path, kill=(experiment, "evaluate", 3))


# Tiles of a picture


@pytest.fixture(name="weights")
def _weights():
    try:
        return wheel_file(*WEIGHTS)
    except MissingDataError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("weights")
def test_bundled_network_knows_a_cat():
    import timm

    from poise.core.data import picture

    encoder = EfficientNetLite0(side=224)
    photograph = picture("chelsea").pixels[:, :300, 60:360].unsqueeze(0)
    features = encoder(photograph)
    assert features.shape == (1, 1280)
    stored = torch.load(wheel_file(*WEIGHTS), weights_only=True)
    weight, bias = list(stored.values())[-2:]
    best = (features @ weight.T + bias).topk(3).indices[0].tolist()
    assert {281, 282, 285} & set(best), "tabby, tiger cat, Egyptian cat"
    assert not encoder.train().training
    assert timm.__version__


@pytest.mark.usefixtures("weights")
def test_histology_preset_trains_on_tiles_and_maps_attention(tmp_path):
    config = replace(EXPERIMENT.presets["histology"], train=4, test=6, epochs=1)
    results = {arm: train(config, arm, tmp_path) for arm in ("baseline", "aem")}
    assert results["aem"].metrics.keys() == MEASURES | {"attention_auc"}
    assert figures(results["aem"].dir) == {"curves.png", "heat_map.png"}
    slide = results["aem"].load("slide")
    assert slide["weights"].sum().item() == pytest.approx(1, abs=1e-5)
    EXPERIMENT.compare(config, results, Run.scratch(tmp_path / "compare"))
    assert {"bags.png", "models.png"} <= figures(tmp_path / "compare")


# Slides as files of features


def features(index, width=384):
    values = np.random.default_rng(index).normal(size=(5 + index % 3, width))
    return (values + index % 2).astype(np.float16)


def write_aem(path, names):
    with h5py.File(path, "w") as file:
        for index, name in enumerate(names):
            group = file.create_group(name)
            group.create_dataset("feat", data=features(index))
            count = len(group["feat"])
            group.create_dataset("coords", data=np.stack([512 * np.arange(count), np.zeros(count, int)], 1))
            group.attrs["label"] = index % 2
    return path


def write_clam(folder, names, layout, table):
    inside = folder / {"clam_h5": "h5_files", "clam_pt": "pt_files"}[layout]
    inside.mkdir(parents=True)
    for index, name in enumerate(names):
        if layout == "clam_pt":
            torch.save(torch.from_numpy(features(index)), inside / f"{name}.pt")
        else:
            with h5py.File(inside / f"{name}.h5", "w") as file:
                file.create_dataset("features", data=features(index))
                file.create_dataset("coords", data=np.stack([512 * np.arange(len(features(index)))] * 2, 1))
    (folder / "labels.csv").write_text(table)
    return folder


FEW = {"epochs": 2, "hidden": 128}
CAMELYON16 = [f"{kind}_{number:03d}" for kind in ("normal", "tumor") for number in range(20)]


@pytest.mark.parametrize("arm", ["baseline", "aem", "multihead_aem", "dsmil_aem", "transmil_aem"])
def test_paper_preset_reads_the_authors_file_of_camelyon16(arm, tmp_path):
    names = [name for pair in zip(CAMELYON16[:20], CAMELYON16[20:], strict=True) for name in pair]
    data = write_aem(tmp_path / "camelyon16.h5", [*names, *(f"test_{number:03d}" for number in range(6))])
    config = replace(EXPERIMENT.presets["paper"], **FEW)
    assert (config.learning_rate, config.weight_decay, EXPERIMENT.presets["paper"].epochs) == (1e-4, 1e-5, 50)
    result = train(config, arm, tmp_path, data=data)
    assert result.metrics.keys() == MEASURES
    assert figures(result.dir) == {"curves.png", "heat_map.png"}


def test_paper_preset_tests_the_two_last_centres_of_camelyon17(tmp_path):
    names = [f"patient_{patient:03d}_node_{node}" for patient in range(0, 100, 5) for node in range(2)]
    config = replace(EXPERIMENT.presets["camelyon17"], **FEW)
    data = write_aem(tmp_path / "camelyon17.h5", names)
    split = experiment.load(config, Run.scratch(tmp_path / "load", data=data))
    assert {slide.patient for slide in split.test.slides} == {f"patient_{patient:03d}" for patient in range(60, 100, 5)}
    assert not {s.patient for s in split.train.slides} & {s.patient for s in split.validation.slides}
    train(config, "aem", tmp_path, data=data)
    with pytest.raises(BadInput, match="called patient_<number>_node_<number>"):
        train(config, "aem", tmp_path / "other", data=write_aem(tmp_path / "other.h5", CAMELYON16))


@pytest.mark.parametrize("layout", ["clam_h5", "clam_pt"])
def test_bracs_preset_merges_classes_and_follows_the_table(layout, tmp_path):
    names = [f"BRACS_{index}" for index in range(42)]
    rows = [f"{name},{i % 7},{('train', 'val', 'test')[i // 14]}" for i, name in enumerate(names)]
    data = write_clam(tmp_path / "bracs", names, layout, "\n".join(["slide_id,label,split", *rows]))
    config = replace(EXPERIMENT.presets["bracs"], layout=layout, **FEW)
    split = experiment.load(config, Run.scratch(tmp_path / "load", data=data))
    assert split.classes == 3
    assert sorted(set(split.test.labels.tolist())) == [0, 1, 2]
    train(config, "aem", tmp_path, data=data)


def test_lct_preset_splits_by_patient(tmp_path):
    names = [f"slide_{index}" for index in range(60)]
    rows = [f"{name},case_{index // 2},{(index // 2) % 4}" for index, name in enumerate(names)]
    data = write_clam(tmp_path / "lct", names, "clam_pt", "\n".join(["slide_id,case_id,label", *rows]))
    config = replace(EXPERIMENT.presets["lct"], layout="clam_pt", **FEW)
    result = train(config, "light", tmp_path, data=data)
    assert figures(result.dir) == {"curves.png"}, "CLAM's .pt files have no coordinates"


def test_clams_folds_are_used_and_leakage_refused(tmp_path):
    names = [f"s{index}" for index in range(12)]
    rows = [f"{name},case_{index // 2},{'tumor' if (index // 2) % 2 else 'normal'}" for index, name in enumerate(names)]
    data = write_clam(tmp_path / "clam", names, "clam_h5", "\n".join(["slide_id,case_id,label", *rows]))
    (data / "splits_0.csv").write_text(",train,val,test\n0,s0,s4,s8\n1,s1,s5,s9\n2,s2,s6,s10\n3,s3,s7,s11\n")
    config = replace(EXPERIMENT.presets["bracs"], layout="clam_h5", folds="splits_0.csv", groups=(), **FEW)
    train(config, "aem", tmp_path, data=data)
    (data / "splits_0.csv").write_text(",train,val,test\n0,s0,s4,s1\n1,s2,s6,s10\n")
    with pytest.raises(BadInput, match=r"patient leakage: .* case_0 \(test, train\)"):
        train(config, "aem", tmp_path / "leak", data=data)


def test_a_preset_of_slides_says_what_data_it_needs(tmp_path):
    config = EXPERIMENT.presets["paper"]
    with pytest.raises(BadInput, match=r"--data \(Features of slides"):
        train(config, "aem", tmp_path)
    with pytest.raises(BadInput, match="does not exist"):
        train(config, "aem", tmp_path, data=tmp_path / "nowhere.h5")
