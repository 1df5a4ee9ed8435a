r"""Every field once, with the published values of PROFIT (arXiv 2008.04693 and the authors' code).

A configuration file returns this with differences; the command line overrides single fields:

    python main.py --config configs/digits_w4.py --config.train.batch_size=32 \
      --config.plan.weight_bits="(8, 4)"
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The published 4-bit recipe of MobileNet-v2 on ImageNet, without weights files."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # of initial weights, data order, augmentation and dropout
  # Directory of JAX's compilation cache, local or gs://. "" leaves JAX's own setting: no cache,
  # unless JAX_COMPILATION_CACHE_DIR names one.
  config.compilation_cache = "~/.cache/profit_jax"

  config.model = ml_collections.ConfigDict()
  config.model.name = "mobilenet_v2"  # a key of profit_jax.models.REGISTRY
  config.model.width = 1.0  # multiplies every layer's channels
  # MobileNet-v1 and v2. relu6: what torchvision's and timm's weights were trained with; relu: what
  # the authors' code computes (there 6 only bounds intervals).
  config.model.activation = "relu6"
  config.model.dropout = 0.2  # rate before the classifier
  # Of the stem and of each stage (v1 6 numbers, v2 8, v3 large 7, v3 small 6; ResNet 6, the second
  # its max-pooling's); () is the published ones. Small images want fewer 2s.
  config.model.strides = ()
  # share of the old running statistics that a step keeps; the authors' v3: 0.9997
  config.model.bn_momentum = 0.9
  config.model.bn_epsilon = 1e-5  # added to variances; torchvision's v3: 1e-3
  # MobileNet-v3 only. Squeeze-excite after the depthwise convolution's non-linearity (torchvision,
  # timm), or before it (the authors' code).
  config.model.squeeze_excite = "after"
  # What depthwise convolutions after h-swish pad with: -0.375 (negative padding), or 0.0
  # (torchvision, timm).
  config.model.pad_value = -0.375
  # to multiples of 8, at other widths: nearest (torchvision), up (the authors)
  config.model.channel_rounding = "nearest"

  config.init = ml_collections.ConfigDict()
  # A file of weights under torchvision's, timm's, the authors' or our own names (which, is
  # recognised): .safetensors, .npz, .pth, .pt or .ckpt; or the workdir of another run. "" starts
  # from random weights.
  config.init.weights = ""
  # True: the classifier starts at random, whatever the file has (another number of classes)
  config.init.reset_head = False

  config.teacher = ml_collections.ConfigDict()
  # none; self: the student before quantization (its init.weights, or, from random weights, what the
  # full-precision phase ends with); or a model's name, which needs teacher.weights.
  config.teacher.model = "self"
  config.teacher.weights = ""  # as init.weights
  # batch: the batch's own statistics, as in the authors' code; running: the file's
  config.teacher.batch_stats = "batch"
  # The rest is of another model, with the meaning that it has in config.model and config.data.
  config.teacher.normalization = "dataset"
  config.teacher.width = 1.0
  config.teacher.activation = "relu6"
  config.teacher.strides = ()
  config.teacher.bn_epsilon = 1e-5
  config.teacher.squeeze_excite = "after"
  config.teacher.pad_value = 0.0
  config.teacher.channel_rounding = "nearest"

  config.data = ml_collections.ConfigDict()
  # digits (scikit-learn's); digit_pairs (two of them side by side, 100 classes); folder (images in
  # data_dir/train/CLASS/ and data_dir/val/CLASS/); or any classification set of
  # tensorflow-datasets, with its configuration and version where needed (imagenette/320px-v2). See
  # docs/data.md.
  config.data.name = "imagenet2012"
  # of the folder; of TFDS, local or gs://, "" is its own ($TFDS_DATA_DIR, ~/tensorflow_datasets)
  config.data.data_dir = ""
  config.data.train_split = "train"  # TFDS: parts too, as train[:90%]
  config.data.eval_split = ""  # "" is the first of validation, val, test that is there
  config.data.image_size = 224  # pixels, height and width
  # Mean and standard deviation that pixels are normalized with: dataset (its own), imagenet
  # (torchvision's), inception (0.5 and 0.5, some of timm's files), none (0 and 1: pixels in 0..1).
  config.data.normalization = "dataset"
  # random changes of the training images; False evaluates and trains on the same pixels
  config.data.augment = True
  # Which: resized (a random part of 8 to 100 % of the area, scaled, and mirrored or not), padded
  # (moved by up to an eighth, and mirrored or not: small images). The digits only move.
  config.data.train_crop = "resized"
  # Evaluation cuts the centre, this share of the shorter side: 0.875 is 224 of 256. timm's files:
  # see the file's crop_pct.
  config.data.eval_share = 0.875
  config.data.interpolation = "bicubic"  # or bilinear (torchvision's older files), antialiased
  # share of images that may be broken; they are skipped and named; more stop the run
  config.data.max_broken = 0.001
  # A TFDS set of more than 512 MB is read by so many readers, which the processes share: a multiple
  # of their number. Batch sizes should be multiples of it (otherwise the greatest common divisor
  # counts). The order of the images depends on it.
  config.data.readers = 64

  config.plan = ml_collections.ConfigDict()
  config.plan.weight_bits = (8, 5, 4)  # 2 to 8, falling; () leaves weights in full precision
  config.plan.act_bits = (8, 5, 4)  # likewise, for activations
  # Weight bit widths at whose beginning every kernel's a and c are set anew, to the least squares;
  # () is as published: once, to 0.9 max|w|. Needed at 2 bits: a is learned slowly, and half of 0.9
  # max|w| leaves one weight in ten.
  config.plan.fitted_bits = ()
  config.plan.progressive = True  # False: straight to the last bits of each list
  config.plan.stabilize = True  # BN phases (kernels fixed) before and after each fine-tuning
  config.plan.profit = True  # False: plain fine-tuning at every bit width
  config.plan.profit_bits = (4,)  # weight bit widths at which PROFIT samples AIWQ and freezes
  # Share of the convolutions frozen in ft1, ft2, ...
  config.plan.freeze_fractions = (
    0.0,
    1 / 3,
    2 / 3,
  )
  # phase 1: only with a teacher, from random weights, or with a new classifier
  config.plan.full_precision_epochs = 15
  config.plan.finetune_epochs = 15  # of every fine-tuning phase, ft1 to ft3 included
  config.plan.bn_epochs = 5  # of every BN phase
  config.plan.sampling_epochs = 5  # AIWQ is measured, at constant learning rate
  # On every n-th image of a batch; 1 is all, as published. What 4 saves, and how far the ranking
  # stays the same, stands in benchmarks/RESULTS.md.
  config.plan.sampling_every = 1
  config.plan.warmup_epochs = 3  # of full-precision and fine-tuning phases

  config.quant = ml_collections.ConfigDict()
  # duq (the paper's own), or under the same plan and policy lsq, pact, qil: profit_jax/quant has a
  # file for each.
  config.quant.method = "duq"
  # True: kernels have scalars for every output channel, not one set each
  config.quant.per_channel = False
  # Least bits of the first layer's kernel, and of the classifier's kernel and input: 2 to 8; 0 is
  # those of all layers.
  config.quant.first_bits = 0
  config.quant.last_bits = 0

  config.remedy = ml_collections.ConfigDict()
  # For weights that oscillate (Nagel et al., ICML 2022), beside PROFIT or instead of it;
  # docs/ablation.md. The first two need quant.method duq or lsq.
  # the dampening loss's last weight, to which it rises from 0; theirs 0.1 on ImageNet
  config.remedy.dampening = 0.0
  # (first, last) oscillation frequency a step above which a weight's code is fixed, falling from
  # one to the other; theirs (0.1, 0.01) at 4 bits. () fixes none.
  config.remedy.freezing_thresholds = ()
  # share of a step in that frequency's running mean: well below the thresholds
  config.remedy.freezing_momentum = 0.001
  # Batches of the training data from which batch statistics are estimated anew before every
  # evaluation of a quantized net; 0 evaluates with the running ones.
  config.remedy.bn_batches = 0

  config.train = ml_collections.ConfigDict()
  config.train.batch_size = 256  # global: over all devices
  # A batch is computed in so many parts, one after the other, where it is larger than memory. Batch
  # statistics are then those of a part.
  config.train.accumulation_steps = 1
  config.train.eval_batch_size = 256
  config.train.learning_rate = 0.005  # of weights, norms and biases; SGD with Nesterov momentum
  config.train.full_precision_learning_rate = 0.005  # the same in the full-precision phase
  config.train.quantizer_lr_scale = 0.01  # learning rate of a and c over that of the weights
  config.train.weight_decay = 4e-5  # of kernels only, added to the gradient
  config.train.momentum = 0.9
  config.train.ema_rate = 0.9997  # share of the average that a step keeps; 0 keeps no average
  # Arithmetic of training. float32: products of codes take one pass of the matrix unit, which is
  # exact for them; all others have full precision. tfloat32: stored in float32, all products take
  # one pass (TF32 on GPUs, bfloat16 on TPUs). bfloat16: activations and their gradients are stored
  # in bfloat16. auto: bfloat16 on TPUs, tfloat32 on GPUs, float32 on CPUs; a run keeps what it
  # began with. Parameters and batch statistics are float32 in all of them, and so is evaluation.
  config.train.dtype = "auto"
  # Form of operations: tuned for the platform, or plain xla.
  config.train.kernels = "tuned"

  config.checkpoint = ml_collections.ConfigDict()
  # the newest that stay; each has all that the run needs, the best weights so far included
  config.checkpoint.keep = 3
  # between two, in mid-epoch too; the end of every phase has one besides
  config.checkpoint.minutes = 10.0

  config.recovery = ml_collections.ConfigDict()
  # A loss or gradient that is not finite stops the run. Above 0: so many times in all, the run goes
  # back to its last checkpoint instead, and on with all learning rates multiplied by the factor.
  config.recovery.retries = 0
  config.recovery.learning_rate_factor = 0.5
  return config.lock()
