"""TensorRT engines: what the kernels take, the library of plugins, and the process that builds."""
