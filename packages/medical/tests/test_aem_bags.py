"""Bags, tables and files of slides: the published formats are read, and bad ones refused with one clear error."""

import csv

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from poise.medical import (
    ABMIL,
    AttentionEntropyLoss,
    Bag,
    FeatureBagDataset,
    MILTrainer,
    Slide,
    Slides,
    bag_metrics,
    check_patients,
    collate_bags,
    heat_map,
    picture_tiles,
    read_slides,
    slides_of_h5,
    split_patients,
    tile_grid,
)

SIZES = {"s1": 4, "s2": 1, "s3": 6}


def features(name, dtype=np.float32, width=5):
    return np.random.default_rng(SIZES[name]).normal(size=(SIZES[name], width)).astype(dtype)


def coords(name):
    return np.stack([256 * np.arange(SIZES[name]), np.zeros(SIZES[name])], 1).astype(np.int64)


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def slides(*labels):
    return Slides.of(Slide(name, label, name) for name, label in zip(SIZES, labels, strict=True))


@pytest.fixture(name="stored", params=["aem_h5", "clam_h5", "clam_pt"])
def _stored(request, tmp_path):
    """The three slides in one of the layouts, in half precision, and where they lie."""
    layout = request.param
    if layout == "aem_h5":
        root = tmp_path / "features.h5"
        with h5py.File(root, "w") as file:
            for label, name in enumerate(SIZES):
                group = file.create_group(name)
                group.create_dataset("feat", data=features(name, np.float16))
                group.create_dataset("coords", data=coords(name))
                group.attrs["label"] = label % 2
        return layout, root
    folder = tmp_path / ("h5_files" if layout == "clam_h5" else "pt_files")
    folder.mkdir()
    for name in SIZES:
        if layout == "clam_pt":
            torch.save(torch.from_numpy(features(name, np.float16)), folder / f"{name}.pt")
            continue
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=features(name, np.float16))
            file.create_dataset("coords", data=coords(name))
    return layout, tmp_path


def test_every_layout_gives_the_same_bags(stored):
    layout, root = stored
    dataset = FeatureBagDataset(root, layout, slides(0, 1, 0))
    assert len(dataset) == 3
    assert dataset.labels.tolist() == [0, 1, 0]
    for bag, name in zip((dataset[index] for index in range(3)), SIZES, strict=True):
        assert bag.id == name
        assert bag.features.dtype == torch.float32
        assert np.array_equal(bag.features.numpy(), features(name, np.float16).astype(np.float32))
        assert bag.coords is None if layout == "clam_pt" else np.array_equal(bag.coords.numpy(), coords(name))


def test_workers_read_slides_and_batches_are_padded(stored):
    layout, root = stored
    loader = DataLoader(
        FeatureBagDataset(root, layout, slides(0, 1, 0)), batch_size=3, collate_fn=collate_bags, num_workers=1
    )
    (batch,) = loader
    assert batch.features.shape == (3, 6, 5)
    assert batch.mask.sum(1).tolist() == list(SIZES.values())
    assert batch.ids == tuple(SIZES)
    assert not batch.features[~batch.mask].any()
    assert (batch.coords is None) is (layout == "clam_pt")


def test_slides_without_features_are_named(stored):
    layout, root = stored
    with pytest.raises(ValueError, match=r"1 of 1 slides have no features .*: s9"):
        FeatureBagDataset(root, layout, Slides.of([Slide("s9", 0, "s9")]))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FeatureBagDataset(root / "nowhere", layout, slides(0, 1, 0))
    with pytest.raises(ValueError, match="layout must be one of"):
        FeatureBagDataset(root, "npy", slides(0, 1, 0))


def test_labels_are_read_from_the_authors_file(tmp_path, stored):
    layout, root = stored
    if layout != "aem_h5":
        with pytest.raises(ValueError, match="not an HDF5 file"):
            slides_of_h5(root)
        return
    assert [(slide.id, slide.label) for slide in slides_of_h5(root)] == [("s1", 0), ("s2", 1), ("s3", 0)]
    with h5py.File(root, "a") as file:
        del file["s2"].attrs["label"]
        del file["s3"]["feat"]
    with pytest.raises(ValueError, match="attribute label: s2"):
        slides_of_h5(root)
    with pytest.raises(ValueError, match=r"slide 's3' has no dataset 'feat', only \['coords'\]"):
        FeatureBagDataset(root, layout, slides(0, 1, 0))[2]


def test_a_file_of_weights_in_place_of_features_is_refused(tmp_path):
    torch.save({"features": torch.zeros(2, 3)}, tmp_path / "s1.pt")
    with pytest.raises(ValueError, match="must hold one tensor, got dict"):
        FeatureBagDataset(tmp_path, "clam_pt", Slides.of([Slide("s1", 0, "s1")]))[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": torch.zeros(0, 3), "label": 0}, "'x' is empty"),
        ({"features": torch.zeros(3), "label": 0}, "shape"),
        (
            {"features": torch.tensor([[1.0, float("nan")], [1.0, 2.0]]), "label": 0},
            "1 of 2 instances .* NaN or infinite",
        ),
        ({"features": torch.tensor([[float("inf")], [-float("inf")]]), "label": 0}, "2 of 2 instances"),
        ({"features": torch.zeros(2, 3, dtype=torch.int64), "label": 0}, "floating-point"),
        ({"features": torch.zeros(2, 3), "label": -1}, "label must be"),
        ({"features": torch.zeros(2, 3), "label": 0, "coords": torch.zeros(3, 2)}, "coordinates"),
    ],
)
def test_what_is_no_bag_is_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Bag(**arguments, id="x")


def test_bags_of_different_width_do_not_mix():
    with pytest.raises(ValueError, match=r"one number of features, got \[2, 3\]"):
        collate_bags([Bag(torch.zeros(1, 2), 0), Bag(torch.zeros(1, 3), 0)])
    with pytest.raises(ValueError, match="no bag"):
        collate_bags([])


# Tables


def test_tables_name_classes_and_patients(tmp_path):
    rows = [
        {"case_id": "p1", "slide_id": "s1", "label": "tumor", "split": "train"},
        {"case_id": "p2", "slide_id": "s2", "label": "normal", "split": "test"},
    ]
    table = read_slides(write_table(tmp_path / "labels.csv", rows))
    assert table.classes == ("normal", "tumor")
    assert table.part("train").rows == (Slide("s1", 1, "p1", "train"),)
    with pytest.raises(ValueError, match="no slide is in the split 'val'"):
        table.part("val")
    assert read_slides(tmp_path / "labels.csv", classes=["tumor", "normal"]).rows[0].label == 0
    with pytest.raises(ValueError, match="'s2' has the label 'normal', which is not one of"):
        read_slides(tmp_path / "labels.csv", classes=["tumor"])


def test_clams_table_of_splits_is_read(tmp_path):
    labels = write_table(tmp_path / "labels.csv", [{"slide_id": f"s{i}", "label": i % 2} for i in range(5)])
    folds = tmp_path / "splits_0.csv"
    folds.write_text(",train,val,test\n0,s0,s2,s3\n1,s1,,\n")
    table = read_slides(labels, splits=folds)
    assert {slide.id: slide.split for slide in table} == {"s0": "train", "s1": "train", "s2": "val", "s3": "test"}
    folds.write_text(",train,val,test\n0,s0,s0,s3\n")
    with pytest.raises(ValueError, match="more than once: s0"):
        read_slides(labels, splits=folds)
    folds.write_text(",train,val,test\n0,s0,s7,s3\n")
    with pytest.raises(ValueError, match="no label: s7"):
        read_slides(labels, splits=folds)


def test_leakage_of_patients_is_refused(tmp_path):
    rows = [
        {"patient_id": "ann", "slide_id": "a1", "label": 0, "split": "train"},
        {"patient_id": "ann", "slide_id": "a2", "label": 1, "split": "test"},
        {"patient_id": "bob", "slide_id": "b1", "label": 1, "split": "test"},
    ]
    with pytest.raises(ValueError, match=r"patient leakage: 1 patients .* ann \(test, train\)"):
        read_slides(write_table(tmp_path / "labels.csv", rows))
    labels = write_table(tmp_path / "labels.csv", [{**row, "split": ""} for row in rows])
    (tmp_path / "splits_0.csv").write_text("train,val,test\na1,a2,b1\n")
    with pytest.raises(ValueError, match=r"ann \(train, val\)"):
        read_slides(labels, splits=tmp_path / "splits_0.csv")
    with pytest.raises(ValueError, match="patient leakage"):
        check_patients([Slide("x", 0, "p", "train"), Slide("y", 0, "p", "val")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,label\ns1,0\n", "slide_id is missing"),
        ("slide_id,label\ns1,\n", "without a label: s1"),
        ("slide_id,label\ns1,-1\n", "0 or above"),
        ("slide_id,label\ns1,0\ns1,1\n", "more than once: s1"),
    ],
)
def test_bad_tables_are_refused(text, message, tmp_path):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_slides(tmp_path / "labels.csv")


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"'s' has the label 2, but labels must lie in 0\.\.1"):
        Slides((Slide("s", 2, "p"),), ("no", "yes"))


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 2)), min_size=12, max_size=60), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_splits_by_patient_never_leak_and_keep_proportions(rows, seed):
    table = Slides.of(Slide(f"s{i}", label, f"p{patient}") for i, (patient, label) in enumerate(rows))
    parted = split_patients(table, {"train": 0.5, "val": 0.25, "test": 0.25}, seed)
    check_patients(parted)
    assert all(slide.split for slide in parted)
    patients = {slide.patient for slide in parted}
    for split, share in (("train", 0.5), ("val", 0.25), ("test", 0.25)):
        count = len({slide.patient for slide in parted if slide.split == split})
        assert abs(count - share * len(patients)) <= 1
    assert parted == split_patients(table, {"train": 0.5, "val": 0.25, "test": 0.25}, seed)


def test_splits_are_stratified_and_their_shares_checked():
    table = Slides.of(Slide(f"s{i}", i % 2, f"p{i}") for i in range(40))
    parted = split_patients(table, {"train": 0.8, "test": 0.2})
    assert sorted(slide.label for slide in parted.part("test")) == [0] * 4 + [1] * 4
    for shares in ({"train": 0.8}, {"train": 1.2, "test": -0.2}, {}):
        with pytest.raises(ValueError, match="sum to 1"):
            split_patients(table, shares)


def test_classes_are_merged_in_groups():
    table = Slides.of(Slide(f"s{i}", i, f"p{i}") for i in range(7))
    merged = table.merged([(0, 1, 2), (3, 4), (5, 6)])
    assert [slide.label for slide in merged] == [0, 0, 0, 1, 1, 2, 2]
    assert merged.classes == ("0+1+2", "3+4", "5+6")
    with pytest.raises(ValueError, match="each of the 7 classes once"):
        table.merged([(0, 1), (1, 2)])


# Pictures


def test_weights_lie_where_their_tiles_do():
    pixels = torch.arange(48.0).reshape(1, 6, 8)
    tiles, places = picture_tiles(pixels, size=2, stride=2)
    assert tiles.shape == (12, 1, 2, 2)
    corners = torch.stack([pixels[0, y, x] for x, y in places.tolist()])
    assert torch.equal(tiles[:, 0, 0, 0], corners)
    assert torch.equal(tile_grid(corners, places), pixels[0, ::2, ::2])
    with pytest.raises(ValueError, match="give no tile"):
        picture_tiles(pixels, size=7)
    with pytest.raises(ValueError, match="grid of 3 pixels"):
        tile_grid(corners, places, stride=3)
    figure = heat_map(torch.full((12,), 1 / 12), places, picture=pixels / 48)
    assert len(figure.axes) == 3


# Training


def test_metrics_are_those_of_scikit_learn():
    from sklearn.metrics import f1_score, roc_auc_score

    generator = torch.Generator().manual_seed(0)
    for classes in (2, 4):
        logits = torch.randn(60, classes, generator=generator)
        labels = torch.randint(classes, (60,), generator=generator)
        ours, probabilities = bag_metrics(logits, labels), logits.softmax(1).numpy()
        auc = roc_auc_score(labels, probabilities[:, 1] if classes == 2 else probabilities, multi_class="ovr")
        assert ours.macro_auc == pytest.approx(auc, abs=1e-6)
        assert ours.macro_f1 == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"), abs=1e-6)
        assert ours.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    with pytest.raises(ValueError, match="at least two classes"):
        bag_metrics(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))


def bright_bags(count, seed):
    """Positive bags hold two instances that stand out."""
    generator = torch.Generator().manual_seed(seed)
    bags = []
    for index in range(count):
        size = int(torch.randint(5, 12, (), generator=generator))
        instances = torch.randn(size, 6, generator=generator)
        instances[:2, 0] += 4 * (index % 2)
        bags.append(Bag(instances, index % 2, id=str(index)))
    return bags


def test_trainer_follows_the_published_recipe_and_keeps_the_best_epoch():
    torch.manual_seed(0)
    loaders = [DataLoader(bright_bags(24, seed), batch_size=1, collate_fn=collate_bags) for seed in (0, 1)]
    aem = AttentionEntropyLoss(0.05, annealing="cosine", total_steps=24 * 6)
    trainer = MILTrainer(ABMIL(6, 16, 2), aem, lr=1e-2, epochs=6, rho=0.8)
    history = trainer.fit(*loaders)
    assert len(history) == 6
    assert trainer.optimizer.param_groups[0]["lr"] < 1e-5
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 1e-5
    assert aem.weight == 0
    metrics, entropy = trainer.evaluate(loaders[1])
    best = max(history, key=lambda record: record["macro_f1"] + record["macro_auc"])
    assert (metrics.macro_f1, metrics.macro_auc, entropy) == (best["macro_f1"], best["macro_auc"], best["entropy"])
    assert metrics.macro_auc > 0.9


def test_trainer_refuses_what_it_cannot_train_on():
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        MILTrainer(ABMIL(6, 16, 2), epochs=0)
    with pytest.raises(ValueError, match="rho must lie"):
        MILTrainer(ABMIL(6, 16, 2), rho=2.0)
    loader = DataLoader([Bag(torch.zeros(3, 6), 2)], collate_fn=collate_bags)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1"):
        MILTrainer(ABMIL(6, 16, 2), epochs=1).fit(loader)
