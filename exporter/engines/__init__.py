"""TensorRT engines: what the kernels support, the plugin library, and the process that builds."""
