// The GPU's context of resident.cuh, and the entry point. Compiled for one cascade: resident.py puts FC_WARPS (of a
// block), FC_BLOCKS (on a multiprocessor), FC_LAYERS and FC_HEADS ahead of it. From sm_80 on.
#include "resident.cuh"

namespace fastcascade {

extern __shared__ __align__(128) unsigned char shared_memory[];

struct ResidentDevice : DeviceContext {
  int own;
  __device__ ResidentDevice() : own(threadIdx.x) {}
  __device__ void obscure_thread() { asm volatile("" : "+r"(own)); }
  __device__ void converge() const { __syncwarp(); }
  __device__ int thread() const { return own; }
  __device__ int lane() const { return own % kWarp; }
  __device__ int warp() const { return own / kWarp; }

  template <class T>
  static __device__ T& at(int offset) {
    return *reinterpret_cast<T*>(shared_memory + offset);
  }
  __device__ unsigned int load32(int offset) const { return at<unsigned int>(offset); }
  __device__ void store32(int offset, unsigned int value) const { at<unsigned int>(offset) = value; }
  __device__ Quad load128(int offset) const { return at<Quad>(offset); }
  __device__ void store128(int offset, const Quad& value) const { at<Quad>(offset) = value; }
  __device__ float load_float(int offset) const { return at<float>(offset); }
  __device__ void store_float(int offset, float value) const { at<float>(offset) = value; }
  __device__ const float* floats(int offset) const { return &at<float>(offset); }
  __device__ int atomic_add(int* address, int value) const { return atomicAdd(address, value); }

  __device__ Quad load_global(const Quad* from) const {
    Quad v;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "l"(from));
    return v;
  }
  // Volatile, so that it stays between its barriers; between two barriers no thread writes what another reads.
  __device__ void load_matrix(unsigned int (&a)[4], int offset) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(static_cast<unsigned int>(__cvta_generic_to_shared(shared_memory)) + offset));
  }
  __device__ void mma(float (&d)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) const {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  template <bool kRelu>
  __device__ unsigned int pack(float low, float high) const {
    unsigned int value;
    if (kRelu)
      asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(value) : "f"(high), "f"(low));
    else
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(value) : "f"(high), "f"(low));
    return value;
  }
  __device__ void unpack(unsigned int value, float& low, float& high) const {
    low = to_float(Half{static_cast<unsigned short>(value)});
    high = to_float(Half{static_cast<unsigned short>(value >> 16)});
  }
  __device__ unsigned int max2(unsigned int a, unsigned int b) const {
    unsigned int value;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(value) : "r"(a), "r"(b));
    return value;
  }
};

}  // namespace fastcascade

extern "C" __global__ void __launch_bounds__(fastcascade::kBlockThreads, FC_BLOCKS)
    resident_cascade(const __grid_constant__ fastcascade::ResidentCascade net) {
  fastcascade::ResidentDevice context;
  fastcascade::run_cascade(context, net);
}
