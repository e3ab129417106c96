"""What poise.medical offers. Imports no torch, so that ``poise list`` is instant."""

from poise.core.catalog import Method

METHODS: tuple[Method, ...] = (
    Method(
        slug="aem",
        package="medical",
        title="Attention entropy maximization (AEM)",
        kind="penalty",
        problem="Train attention on few large bags (whole slides) without it fixing on a handful of instances.",
        summary=(
            "Adds the negative entropy of the attention weights to the loss of any attention-based multiple-instance model: one "
            "term, one number, no second network."
        ),
        formula=(
            r"L = L_{bag} + \lambda \, \frac1K \sum_{k=1}^K \sum_n a_{kn} \log a_{kn}, \qquad a_k = \mathrm{softmax}(e_k)"
        ),
        usage="""
import torch
from torch.utils.data import DataLoader
from poise.medical import ABMIL, AttentionEntropyLoss, Bag, collate_bags

bags = [Bag(torch.randn(50 + 10 * i, 384), label=i % 2) for i in range(8)]  # a slide each, of any size
model, aem = ABMIL(in_dim=384, hidden=128, num_classes=2), AttentionEntropyLoss(weight=0.1)
optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=1e-5)

for batch in DataLoader(bags, batch_size=4, shuffle=True, collate_fn=collate_bags):
    reading = model.read(batch.features, batch.mask)
    loss = reading.loss(batch.labels) + aem(reading.scores, batch.mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(aem.normalized_entropy.item())  # 1 is even attention
""",
        api=(
            "poise.medical.AttentionEntropyLoss",
            "poise.medical.attention_entropy",
            "poise.medical.ABMIL",
            "poise.medical.DSMIL",
            "poise.medical.TransMIL",
            "poise.medical.FromMONAI",
            "poise.medical.FromTorchmil",
            "poise.medical.BagModel",
            "poise.medical.Reading",
            "poise.medical.GatedAttention",
            "poise.medical.QueryAttention",
            "poise.medical.Subsample",
            "poise.medical.Bag",
            "poise.medical.BagBatch",
            "poise.medical.collate_bags",
            "poise.medical.FeatureBagDataset",
            "poise.medical.slides_of_h5",
            "poise.medical.Slide",
            "poise.medical.Slides",
            "poise.medical.read_slides",
            "poise.medical.split_patients",
            "poise.medical.check_patients",
            "poise.medical.MILTrainer",
            "poise.medical.BagMetrics",
            "poise.medical.bag_metrics",
            "poise.medical.heat_map",
            "poise.medical.tile_grid",
            "poise.medical.picture_tiles",
            "poise.medical.EfficientNetLite0",
            "poise.medical.SlideTiles",
            "poise.medical.extract_features",
        ),
        presets=("quick", "histology", "paper", "camelyon17", "bracs", "lct"),
        arms=(
            "baseline",
            "light",
            "aem",
            "annealed",
            "subsampled",
            "subsampled_aem",
            "plain",
            "plain_aem",
            "multihead",
            "multihead_aem",
            "dsmil",
            "dsmil_aem",
            "transmil",
            "transmil_aem",
        ),
        paper=(
            "Y. Zhang, Z. Shui, Y. Sun, H. Li, J. Li, C. Zhu, L. Yang, AEM: Attention Entropy Maximization for Multiple Instance "
            "Learning based Whole Slide Image Classification, 2024"
        ),
        url="https://arxiv.org/abs/2406.15303",
        bibtex=r"""
@misc{zhang2024aem,
  title         = {{AEM}: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide Image Classification},
  author        = {Zhang, Yunlong and Shui, Zhongyi and Sun, Yunxuan and Li, Honglin and Li, Jingxiong and Zhu, Chenglu and Yang, Lin},
  year          = {2024},
  eprint        = {2406.15303},
  archivePrefix = {arXiv},
}
""",
        tags=(
            "multiple-instance learning",
            "attention",
            "entropy",
            "whole slide images",
            "histopathology",
            "weak supervision",
            "overfitting",
        ),
    ),
)
