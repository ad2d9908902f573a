"""One thread: the tests' products are small, and threads that wait for each other crawl on a busy machine."""

import torch

torch.set_num_threads(1)
