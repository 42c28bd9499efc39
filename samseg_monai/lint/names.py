"""What a bundle may name: components, functions, values and modules known to load no code and run nothing.

Written for MONAI 1.6.1. A component is listed when none of its arguments makes it read a pickle, download, start a
program or look code up by a name in a string; the arguments that still could are in ``ARGUMENTS``. Left out on purpose
are, among others, ``PersistentDataset``, ``LMDBDataset`` and ``GDSDataset`` (pickles on disk), ``CheckpointLoader``
(``torch.load``), ``PatchInferer`` (``merger_cls`` is looked up anywhere), ``TorchVision``, ``TorchIO`` and ``CuCIM``
(functions by name), ``PerceptualLoss`` and ``EfficientNetBN`` (downloads), ``CSVDataset`` (reads URLs),
``MLFlowHandler`` and ``ClearML*`` (network), ``DatasetFunc``, and everything of ``monai.apps`` and ``monai.bundle``.
"""

from __future__ import annotations

import re


def words(text: str) -> frozenset[str]:
    """The words of a text: lists of names read better without quotes and commas."""
    return frozenset(text.split())


# Each also as <name>d, <name>D and <name>Dict: MONAI's names of the transform that works on dictionaries.
TRANSFORMS = words(
    """
    Activations AddCoordinateChannels AddExtremePointsChannel AdjustContrast Affine AffineGrid AsChannelLast
    AsDiscrete BorderPad BoundingRect CastToType CenterScaleCrop CenterSpatialCrop ClassesToIndices
    ClipIntensityPercentiles Compose ConcatItems ConvertBoxToPoints ConvertPointsToBoxes
    ConvertToMultiChannelBasedOnBratsClasses CopyItems Crop CropForeground CutMix CutOut Decollate DeleteItems
    DetectEnvelope DistanceTransformEDT DivisiblePad EnsureChannelFirst EnsureType FgBgToIndices FillHoles
    FlattenSequence FlattenSubKeys Flip ForegroundMask FromMetaTensor GaussianSharpen GaussianSmooth GibbsNoise
    GridDistortion GridPatch GridSplit HistogramNormalize Identity IntensityRemap IntensityStats Invert
    KSpaceSpikeNoise KeepLargestConnectedComponent LabelFilter LabelToContour LabelToMask Lambda LoadImage
    MapLabelValue MaskIntensity MeanEnsemble MedianSmooth MixUp NormalizeIntensity OneOf Orientation Pad
    PadListDataCollate ProbNMS
    Rand2DElastic Rand3DElastic RandAdjustContrast RandAffine RandAffineGrid RandAxisFlip RandBiasField
    RandCoarseDropout RandCoarseShuffle RandCropByLabelClasses RandCropByPosNegLabel RandDeformGrid RandFlip
    RandGaussianNoise RandGaussianSharpen RandGaussianSmooth RandGibbsNoise RandGridDistortion RandGridPatch
    RandHistogramShift RandIdentity RandIntensityRemap RandKSpaceSpikeNoise RandLambda RandRicianNoise RandRotate
    RandRotate90 RandScaleCrop RandScaleIntensity RandScaleIntensityFixedMean RandShiftIntensity
    RandSimulateLowResolution RandSmoothDeform RandSmoothFieldAdjustContrast RandSmoothFieldAdjustIntensity
    RandSpatialCrop RandSpatialCropSamples RandStdShiftIntensity RandWeightedCrop RandZoom RandomOrder
    RemoveRepeatedChannel RemoveSmallObjects RepeatChannel ResampleToMatch Resize ResizeWithPadOrCrop Rotate
    Rotate90 SaveImage SavitzkyGolaySmooth ScaleIntensity ScaleIntensityFixedMean ScaleIntensityRange
    ScaleIntensityRangePercentiles SelectItems ShiftIntensity SobelGradients SomeOf Spacing SpatialCrop SpatialPad
    SpatialResample SplitDim SqueezeDim StdShiftIntensity ThresholdIntensity ToDevice ToMetaTensor ToNumpy ToTensor
    Transpose VoteEnsemble Zoom
    """
)

MONAI = {
    "monai.networks.nets": """
    AttentionUnet AutoEncoder BasicUNet BasicUNetPlusPlus DenseNet DiNTS DynUNet FullyConnectedNet HighResNet MedNeXt
    RegUNet ResNet SegResNet SegResNetDS SegResNetDS2 SegResNetVAE SwinUNETR UNETR UNet ViT
    VNet VarAutoEncoder VoxelMorph""",
    "monai.losses": """
    AsymmetricUnifiedFocalLoss ContrastiveLoss DeepSupervisionLoss DiceCELoss DiceFocalLoss DiceLoss FocalLoss
    GeneralizedDiceFocalLoss GeneralizedDiceLoss GeneralizedWassersteinDiceLoss HausdorffDTLoss LogHausdorffDTLoss
    MaskedDiceLoss MaskedLoss NACLLoss SSIMLoss SoftDiceclDiceLoss SoftclDiceLoss TverskyLoss""",
    "monai.inferers": "SimpleInferer SliceInferer SlidingWindowInferer SlidingWindowInfererAdapt",
    "monai.engines": """
    EnsembleEvaluator PrepareBatchDefault PrepareBatchExtraInput SupervisedEvaluator SupervisedTrainer""",
    "monai.handlers": """
    CheckpointSaver ConfusionMatrix DecollateBatch EarlyStopHandler GarbageCollector HausdorffDistance
    LrScheduleHandler MeanDice MeanIoUHandler MetricLogger MetricsSaver ParamSchedulerHandler PostProcessing ROCAUC
    SmartCacheHandler StatsHandler SurfaceDistance TensorBoardImageHandler TensorBoardStatsHandler
    ValidationHandler""",
    "monai.metrics": """
    ConfusionMatrixMetric CumulativeAverage DiceMetric GeneralizedDiceScore HausdorffDistanceMetric LossMetric
    MAEMetric MSEMetric MeanIoU PSNRMetric PanopticQualityMetric RMSEMetric ROCAUCMetric SSIMMetric SurfaceDiceMetric
    SurfaceDistanceMetric""",
    "monai.data": """
    CacheDataset DataLoader Dataset DistributedSampler DistributedWeightedRandomSampler FolderLayout
    SmartCacheDataset ThreadDataLoader ZipDataset""",
    "monai.optimizers": "ExponentialLR LinearLR Novograd WarmupCosineSchedule",
}

OTHERS = {
    "torch.optim": "ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop SGD",
    "torch.optim.lr_scheduler": """
    ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR ExponentialLR LambdaLR LinearLR MultiStepLR
    MultiplicativeLR OneCycleLR PolynomialLR ReduceLROnPlateau SequentialLR StepLR""",
    "torch.nn": """
    AvgPool2d AvgPool3d BCELoss BCEWithLogitsLoss BatchNorm2d BatchNorm3d Conv2d Conv3d ConvTranspose2d
    ConvTranspose3d CrossEntropyLoss Dropout Flatten GELU GroupNorm Identity InstanceNorm2d InstanceNorm3d L1Loss
    LayerNorm LeakyReLU Linear MSELoss MaxPool2d MaxPool3d NLLLoss PReLU ReLU Sequential Sigmoid SmoothL1Loss Softmax
    Softplus Tanh Upsample""",
    "torch.nn.parallel": "DistributedDataParallel",
    "torch.utils.data": "DataLoader RandomSampler SequentialSampler Subset TensorDataset WeightedRandomSampler",
    "torch.utils.data.distributed": "DistributedSampler",
    "torchvision.models": """
    convnext_base convnext_small convnext_tiny densenet121 efficientnet_b0 efficientnet_b1 efficientnet_b2
    mobilenet_v3_large mobilenet_v3_small resnet101 resnet152 resnet18 resnet34 resnet50 swin_b swin_s swin_t vgg16
    vgg19 vit_b_16""",
    "ignite.handlers": "EarlyStopping ProgressBar TerminateOnNan Timer",
    "ignite.metrics": "Accuracy Average ConfusionMatrix Loss MeanAbsoluteError MeanSquaredError Precision Recall",
}

# Parts of this package whose public classes are components; of some the public functions are, too.
OWN_CLASSES = words(
    """
    adapters data.slices handlers inferers metrics networks
    strategies training transforms"""
)
OWN_FUNCTIONS = frozenset({"training", "transforms"})  # which read and write no files

OWN_READER = "samseg_monai.data.files.images.ImageFileReader"
READERS = (None, "ITKReader", "NibabelReader", "NrrdReader", "PILReader", "PydicomReader", OWN_READER)
WRITERS = (None, "ITKWriter", "NibabelWriter", "PILWriter")
# argument, wherever it stands (an override may give it to any component): values that are known to be harmless, and why
ARGUMENTS: dict[str, tuple[tuple[object, ...], str]] = {
    "reader": (READERS, "any other name is imported and called; NumpyReader reads pickles"),
    "writer": (WRITERS, "any other name is imported and called"),
    "merger_cls": ((None,), "any name is imported and called"),
    "allow_pickle": ((None, False), "LoadImage hands it to NumpyReader, which then reads pickles"),
    "weights_only": ((True,), "anything else reads pickles that run code"),
    "pickle_module": ((None,), "reads pickles"),
    "pretrained": ((None, False), "anything else downloads weights"),
    "compile_kwargs": ((None,), "names a compiler that torch would load and run"),
    "_debug_": ((False,), "stops in a debugger"),
    "_mode_": (("default",), "'callable' gives others a class to call, and LoadImage imports what a text names; "
               "'debug' stops in a debugger"),
    "data_root_dir": ((None, "", "@dataset_dir"), "results may be written beside output_dir"),
    "logging_file": ((None, False), "MONAI acts upon the file that is named here as upon configs/logging.conf"),
}  # fmt: skip
# arguments that name a file to be written, as it may be called: no other name can be that of a program's settings
FILENAMES = words("filename final_filename key_metric_filename metrics_filename")
FILENAME = re.compile(r"[\w-]+\.(csv|json|pt|pth)")

IMPORTS = words(
    """
    logging monai monai.data monai.handlers monai.transforms monai.utils numpy torch torch.distributed
    samseg_monai.bundles samseg_monai.checkpoints samseg_monai.data.files.cases samseg_monai.data.datalists"""
)
# what MONAI puts into every expression
GLOBALS = {"monai": "monai", "np": "numpy", "numpy": "numpy", "torch": "torch"}

BUILTINS = words("abs all any bool dict enumerate float int len list max min range round set sorted str sum tuple zip")
NUMBERS = words("bool float int len")  # builtins whose result holds nothing of a text that they get
PASSING = words("max min")  # builtins that give one of their arguments, or an item of their only one
CALLS = words(
    """
    logging.disable monai.handlers.from_engine monai.utils.set_determinism numpy.array numpy.eye numpy.prod
    torch.Generator torch.cuda.device_count torch.cuda.is_available torch.device
    torch.distributed.destroy_process_group torch.distributed.get_rank torch.distributed.get_world_size
    torch.distributed.is_initialized torch.tensor samseg_monai.bundles.bundle_root samseg_monai.bundles.extra_inputs
    samseg_monai.bundles.in_order
    samseg_monai.bundles.facts samseg_monai.bundles.find_checkpoint samseg_monai.bundles.guard
    samseg_monai.bundles.join_processes samseg_monai.bundles.rank_device samseg_monai.bundles.record_bundle
    samseg_monai.bundles.settings samseg_monai.checkpoints.load_trained samseg_monai.data.files.cases.find_cases
    samseg_monai.data.datalists.labels_of samseg_monai.data.datalists.load_datalist
    samseg_monai.data.datalists.spacing_of samseg_monai.data.datalists.unit_of"""
)
VALUES = words(
    """
    int float bool str
    logging.CRITICAL logging.DEBUG logging.ERROR logging.INFO logging.WARNING
    monai.data.decollate_batch monai.data.list_data_collate monai.data.pad_list_data_collate
    numpy.bool_ numpy.float16 numpy.float32 numpy.float64 numpy.inf numpy.int16 numpy.int32 numpy.int64 numpy.int8
    numpy.nan numpy.pi numpy.uint16 numpy.uint8
    torch.bfloat16 torch.bool torch.float torch.float16 torch.float32 torch.float64 torch.half torch.int torch.int16
    torch.int32 torch.int64 torch.int8 torch.long torch.uint8"""
)
# on what a component, a reference or a call gives: methods that may be called, attributes that may be read
METHODS = words("attach fill finish index load load_base parameters run set_trainer to")
ATTRIBUTES = words("device dtype good ndim requires_grad shape type")

# last names of what is called and never gives a text
TEXTLESS = (BUILTINS - PASSING - {"str"}) | words("device_count get_rank get_world_size index is_available prod")

# results that a run leaves in the bundle, where MONAI bundles have them: data of any kind, and the record of the run
RESULTS = ("eval/", "models/log/")
# hosts of weights files that large_files.yml may name
HOSTS = frozenset({"dl.fbaipublicfiles.com", "download.pytorch.org"})
# what torch.save writes into the pickle of a state dict; all of it is admitted by torch.load(weights_only=True)
STORAGES = words("BFloat16 Bool Byte Char ComplexDouble ComplexFloat Double Float Half Int Long Short")
PICKLED = frozenset(
    {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
    | {f"torch {name}Storage" for name in STORAGES}
)
