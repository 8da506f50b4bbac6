// NVRTC and the CUDA driver as _nvrtc.py calls them; what they do is set by environment variables.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int compilations;
static char image[128];

static int number(const char* name) { return getenv(name) ? atoi(getenv(name)) : 0; }

int fake_compilations(void) { return compilations; }

int nvrtcVersion(int* major, int* minor) {
    *major = 13, *minor = number("FAKE_MINOR");
    return 0;
}
// FAKE_ARCHITECTURES: "80 90"
int nvrtcGetSupportedArchs(int* known) {
    int count = 0;
    char* at = getenv("FAKE_ARCHITECTURES");
    while (at && *at) known[count++] = (int)strtol(at, &at, 10);
    return 0;
}
int nvrtcGetNumSupportedArchs(int* count) {
    *count = 0;
    char* at = getenv("FAKE_ARCHITECTURES");
    while (at && *at) strtol(at, &at, 10), ++*count;
    return 0;
}
int nvrtcCreateProgram(void** program, const char* source, const char* name, int headers, void* a, void* b) {
    *program = image;
    return 0;
}
int nvrtcCompileProgram(void* program, int count, const char** options) {
    compilations++;
    snprintf(image, sizeof image, "%s", options[0]);
    return number("FAKE_COMPILES");
}
int nvrtcGetProgramLogSize(void* program, size_t* size) { return *size = 9, 0; }
int nvrtcGetProgramLog(void* program, char* log) { return strcpy(log, "nonsense"), 0; }
int nvrtcGetCUBINSize(void* program, size_t* size) { return *size = strlen(image) + 7, 0; }
int nvrtcGetCUBIN(void* program, char* out) { return sprintf(out, "cubin %s", image), 0; }
int nvrtcGetPTXSize(void* program, size_t* size) { return *size = strlen(image) + 5, 0; }
int nvrtcGetPTX(void* program, char* out) { return sprintf(out, "ptx %s", image), 0; }
int nvrtcDestroyProgram(void** program) { return 0; }

int cuGetErrorString(int error, const char** text) { return *text = "no such image", 0; }
int cuModuleLoadData(void** module, const void* data) { return number("FAKE_LOADS"); }
int cuModuleGetFunction(void** function, void* module, const char* name) { return 0; }
int cuFuncLoad(void* function) { return 0; }
