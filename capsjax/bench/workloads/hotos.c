/* The convolutional-capsule primitive of Barham and Isard (HotOS 2019) as plain loops:
   V[n,o,x,y,i,j] = sum over c, u, v, k of P[n,c,2x+u,2y+v,i,k] W[c,o,u,v,k,j]. */

enum { STRIDE = 2, KERNEL = 3, POSE = 4 };

void capsule_convolution(const float *restrict poses, const float *restrict weights,
                         float *restrict result, int batch, int channels, int out, int size) {
  const int grid = (size - KERNEL) / STRIDE + 1;
#pragma omp parallel for collapse(2)
  for (int n = 0; n < batch; n++) {
    for (int o = 0; o < out; o++) {
      for (int x = 0; x < grid; x++) {
        for (int y = 0; y < grid; y++) {
          float sum[POSE][POSE] = {{0}};
          for (int c = 0; c < channels; c++) {
            for (int u = 0; u < KERNEL; u++) {
              for (int v = 0; v < KERNEL; v++) {
                const long place = ((long)(n * channels + c) * size + STRIDE * x + u) * size;
                const float *p = poses + (place + STRIDE * y + v) * POSE * POSE;
                const float *w =
                    weights + (((long)(c * out + o) * KERNEL + u) * KERNEL + v) * POSE * POSE;
                for (int i = 0; i < POSE; i++)
                  for (int k = 0; k < POSE; k++)
                    for (int j = 0; j < POSE; j++)
                      sum[i][j] += p[i * POSE + k] * w[k * POSE + j];
              }
            }
          }
          float *v = result + ((((long)n * out + o) * grid + x) * grid + y) * POSE * POSE;
          for (int i = 0; i < POSE; i++)
            for (int j = 0; j < POSE; j++) v[i * POSE + j] = sum[i][j];
        }
      }
    }
  }
}
