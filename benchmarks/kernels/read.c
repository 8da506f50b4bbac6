// Reads memory as fast as the machine lets it; compiled when the benchmark starts. The result keeps the compiler from
// dropping the loop.
typedef long long vec __attribute__((vector_size(64)));

long long read_memory(const char* data, long bytes, int threads, int streams, long ahead) {
  long long total = 0;
  const long part = bytes / (threads * streams) / 128 * 128;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(^ : total)
  for (int thread = 0; thread < threads; ++thread) {
    const char* first = data + thread * streams * part;
    vec even = {0}, odd = {0};
    for (long at = 0; at < part; at += 128) {
      for (int stream = 0; stream < streams; ++stream) {
        const char* here = first + stream * part + at;
        if (ahead) {
          __builtin_prefetch(here + ahead);
          __builtin_prefetch(here + ahead + 64);
        }
        even ^= *(const vec*)here;
        odd ^= *(const vec*)(here + 64);
      }
    }
    even ^= odd;
    for (int i = 0; i < 8; ++i) total ^= even[i];
  }
  return total;
}
