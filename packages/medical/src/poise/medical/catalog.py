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
    Method(
        slug="shisrcnet",
        package="medical",
        title="SHISRCNet",
        kind="network",
        problem="Classify tissue from a low-resolution scanner, with high-resolution images of it in training only.",
        summary=(
            "Restores the resolution and classifies the result in one network trained jointly: pixel difference, focal loss of both "
            "resolutions, and a contrastive term between them."
        ),
        formula=(
            r"L = w_{sr} |G(x) - y|_1 + \tfrac12 w_{cls} \big( \mathrm{focal}(C(G(x)), t) + \mathrm{focal}(C(y), t) \big) "
            r"+ w_{con} \, \mathrm{NTXent}\big( v(G(x)), v(y) \big)"
        ),
        usage="""
import torch
from poise.medical import SHISRCLoss, SHISRCNet, degrade

model, criterion = SHISRCNet(scale=2, num_classes=2), SHISRCLoss()
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
images, labels = torch.rand(8, 3, 64, 64), torch.arange(8) % 2  # high resolution, in training only

for hr, label in zip(images.split(4), labels.split(4)):
    lr = degrade(hr, scale=2)  # what the low-resolution scanner would see
    terms = criterion(model(lr, hr), hr, label)
    optimizer.zero_grad()
    terms["loss"].backward()
    optimizer.step()
    print({name: round(value.item(), 3) for name, value in terms.items()})

output = model.eval()(degrade(images, scale=2))
print(output.sr.shape, output.logits.softmax(1)[:, 1])
""",
        api=(
            "poise.medical.SHISRCNet",
            "poise.medical.SHISRCOutput",
            "poise.medical.SHISRCLoss",
            "poise.medical.focal_loss",
            "poise.medical.nt_xent",
            "poise.medical.SRResNetMFE",
            "poise.medical.MFEBlock",
            "poise.medical.ClassifierCF",
            "poise.medical.Classifier",
            "poise.medical.WithFeatures",
            "poise.medical.SKNet26",
            "poise.medical.SKUnit",
            "poise.medical.SKConv",
            "poise.medical.CrossScalePyramid",
            "poise.medical.CSFBlock",
            "poise.medical.BreaKHis",
            "poise.medical.Micrograph",
            "poise.medical.degrade",
            "poise.medical.enlarge",
            "poise.medical.evaluate_sr",
            "poise.medical.Fidelity",
            "poise.medical.patient_accuracy",
            "poise.medical.image_accuracy",
        ),
        presets=("quick", "paper"),
        arms=("baseline", "two_stage", "joint", "no_contrast", "detached", "shisrcnet", "released", "hr"),
        paper=(
            "L. Xie, C. Li, Z. Wang, X. Zhang, B. Chen, Q. Shen, Z. Wu, SHISRCNet: Super-resolution And Classification Network For "
            "Low-resolution Breast Cancer Histopathology Image, MICCAI 2023"
        ),
        url="https://arxiv.org/abs/2306.14119",
        bibtex=r"""
@inproceedings{xie2023shisrcnet,
  title     = {{SHISRCNet}: Super-resolution And Classification Network For Low-resolution Breast Cancer Histopathology Image},
  author    = {Xie, Luyuan and Li, Cong and Wang, Zirui and Zhang, Xin and Chen, Boyan and Shen, Qingni and Wu, Zhonghai},
  booktitle = {Medical Image Computing and Computer Assisted Intervention},
  year      = {2023},
}
""",
        tags=(
            "super-resolution",
            "histopathology",
            "classification",
            "contrastive learning",
            "focal loss",
            "low resolution",
        ),
    ),
)
