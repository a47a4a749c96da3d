// The processor's float32 peak: what no matrix product can exceed.
//
//   g++ -O3 -std=c++20 -march=native -pthread benchmarks/peak_flops.cpp -o /tmp/peak_flops && /tmp/peak_flops 2
//
// Every thread runs independent fused multiply-adds in registers and touches no memory. Prints GFLOP/s a thread, all
// threads running, the median of five rounds.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

typedef float Lanes __attribute__((vector_size(sizeof(float) * 16)));

static double gflops(double seconds, float* sink) {
  constexpr int kChains = 24, kSteps = 100'000;  // chains enough to hide the latency of an addition
  Lanes sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = Lanes{} + 1e-3f * static_cast<float>(c);
  Lanes factor = Lanes{} + 0.999f;
  const auto start = std::chrono::steady_clock::now();
  double done = 0, elapsed = 0;
  while (elapsed < seconds) {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
      for (int c = 0; c < kChains; ++c) sum[c] = sum[c] * factor + 1e-4f;
      asm volatile("" : "+v"(factor));  // so that no step is left out
    }
    done += 2.0 * 16 * kChains * kSteps;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  for (int c = 0; c < kChains; ++c) *sink += sum[c][0];
  return done / elapsed * 1e-9;
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  std::vector<double> rounds;
  float sink = 0;
  for (int round = 0; round < 5; ++round) {
    std::vector<double> rates(threads);
    std::vector<float> sinks(threads);
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t) running.emplace_back([&, t] { rates[t] = gflops(0.5, &sinks[t]); });
    for (std::thread& thread : running) thread.join();
    for (int t = 0; t < threads; ++t) sink += sinks[t];
    double sum = 0;
    for (double rate : rates) sum += rate;
    rounds.push_back(sum / threads);
  }
  std::sort(rounds.begin(), rounds.end());
  std::printf("%.1f GFLOP/s a thread, %d threads\n", rounds[2], threads);
  return sink == 12345.f;
}
