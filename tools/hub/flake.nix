{
  description = "Kernels for early exit and self-speculative decoding";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs {
    inherit self;
    path = ./.;
  };
}
