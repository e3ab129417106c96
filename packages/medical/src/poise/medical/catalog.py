"""What poise.medical offers. Imports no torch, so that ``poise list`` is instant."""

from poise.core.catalog import Headline, Method

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
        headline=Headline(
            promise="slides are classified better: the area under the ROC curve rises",
            metric="auc",
            arm="aem",
            unit="points",
            step="gated ABMIL step, a bag of 10,000 x 384, hidden 128",
            peer="torchmil",
            peer_case="gated ABMIL, loss and gradient, a bag of 10,000 x 384, hidden 128; agreement of the gradient",
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
        slug="adele",
        package="medical",
        title="Adaptive early-learning correction for segmentation (ADELE)",
        kind="training",
        problem="Train a segmentation network on masks that are badly drawn: too small, too large, or made from activation maps.",
        summary=(
            "Watches the training IoU of every class, finds when the class begins to be memorised, and from then on replaces its "
            "masks by confident predictions, which consistency over scales keeps trustworthy."
        ),
        formula=(
            r"f(t) = a\,(1 - e^{-t^b / c}), \qquad \text{correct class } c \text{ from } t^*: f'(t^*) \approx 0.1\, f'(1), \qquad "
            r"L = \frac13 \Big( \sum_i CE(w_i z_i, y) + \lambda \sum_i KL(p_i \,\|\, q) \Big), \quad q = \sum_i w_i p_i"
        ),
        usage="""
import torch
from monai.networks.nets import UNet
from poise.medical import AdeleTrainer, LabelStore, MemorizationDetector

images, masks = torch.randn(8, 1, 32, 32), torch.randint(0, 3, (8, 32, 32))  # masks of a hurried annotator
model = UNet(spatial_dims=2, in_channels=1, out_channels=3, channels=(8, 16, 32), strides=(2, 2))
trainer = AdeleTrainer(
    model,
    torch.optim.SGD(model.parameters(), 0.01, momentum=0.99),
    LabelStore(masks, num_classes=3),
    MemorizationDetector(num_classes=3, total_epochs=5),
    divisor=4,  # this U-Net halves the image twice
)
for epoch in range(5):
    for index in torch.randperm(8).split(4):
        trainer.step(images[index], index)
    report = trainer.end_epoch()  # detects, and corrects the masks that the next epoch trains on
    print(report.iou.tolist(), report.triggered.tolist(), report.changed)
""",
        api=(
            "poise.medical.AdeleTrainer",
            "poise.medical.AdeleLoss",
            "poise.medical.MultiscaleConsistency",
            "poise.medical.multiscale_consistency",
            "poise.medical.multiscale_forward",
            "poise.medical.multiscale_probabilities",
            "poise.medical.MemorizationDetector",
            "poise.medical.fit_iou_curve",
            "poise.medical.IoUCurve",
            "poise.medical.memorization_epoch",
            "poise.medical.StreamingIoU",
            "poise.medical.correct_labels",
            "poise.medical.Correction",
            "poise.medical.CorrectionSchedule",
            "poise.medical.LabelStore",
            "poise.medical.under_over_segment",
            "poise.medical.random_under_over",
            "poise.medical.SegTHORSlices",
            "poise.medical.VOCPseudoLabels",
            "poise.medical.VOCCrops",
        ),
        presets=("quick", "paper", "pascal"),
        arms=("baseline", "global", "correction", "consistency", "both", "dilated"),
        headline=Headline(
            promise="segmentation trained on wrong masks improves: the IoU rises",
            metric="miou",
            arm="both",
            unit="points",
            step="MONAI UNet 16-64, 5 slices of 128 x 128: ADELE's loss at scales 0.7, 1, 1.5 against cross-entropy",
            peer="MONAI DiceCELoss",
            peer_case="training step of MONAI UNet 16-64, 5 slices of 128 x 128; agreement of the cross-entropy of one scale",
        ),
        paper=(
            "S. Liu, K. Liu, W. Zhu, Y. Shen, C. Fernandez-Granda, Adaptive Early-Learning Correction for Segmentation from Noisy "
            "Annotations, CVPR 2022"
        ),
        url="https://arxiv.org/abs/2110.03740",
        bibtex=r"""
@inproceedings{liu2022adele,
  title     = {Adaptive Early-Learning Correction for Segmentation from Noisy Annotations},
  author    = {Liu, Sheng and Liu, Kangning and Zhu, Weicheng and Shen, Yiqiu and Fernandez-Granda, Carlos},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022},
  eprint    = {2110.03740},
  archivePrefix = {arXiv},
}
""",
        tags=(
            "segmentation",
            "noisy labels",
            "early learning",
            "label correction",
            "consistency",
            "weak supervision",
            "memorisation",
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
        headline=Headline(
            promise="images of low resolution are classified better: accuracy rises",
            metric="accuracy",
            arm="shisrcnet",
            unit="points",
            step="training step, 4 images of 128 x 128 from 1/2: SHISRCNet against its classifier alone",
            peer="MONAI",
            peer_case="focal loss with softmax, gradient, 4,096 x 100",
        ),
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
