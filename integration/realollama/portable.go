package realollama

import (
	"os"
	"runtime"
	"strings"
)

// The servers are built for a fixed baseline of each architecture, not for the processor at hand
// (-march=native). A processor can list instructions whose use its kernel does not permit: with
// native flags on an Intel Xeon with AMX, Ollama 0.24.0 did not link, and the engine of 0.34 died
// of SIGILL at the first quantized prompt. And a cache that is moved to another machine goes on
// working.
//
// On x86-64 the baseline is x86-64-v3 (Haswell of 2013, Zen of 2017, and later), spelled out since
// GCC before 11 does not know its name. On 64-bit Arm it is Armv8.2-A.

// baselineCompilerFlags are for GCC and Clang.
func baselineCompilerFlags(goarch string) []string {
	switch goarch {
	case "amd64":
		return []string{"-mavx", "-mavx2", "-mbmi", "-mbmi2", "-mf16c", "-mfma", "-mlzcnt", "-mmovbe", "-mpopcnt"}
	case "arm64":
		return []string{"-march=armv8.2-a"}
	}
	return nil
}

// baselineCMakeFlags are for the build of llama.cpp, whose default is the processor at hand.
func baselineCMakeFlags(goarch string) []string {
	flags := []string{"-DGGML_NATIVE=OFF"}
	switch goarch {
	case "amd64":
		for _, feature := range []string{"SSE42", "AVX", "AVX2", "BMI2", "F16C", "FMA"} {
			flags = append(flags, "-DGGML_"+feature+"=ON")
		}
	case "arm64":
		flags = append(flags, "-DGGML_CPU_ARM_ARCH=armv8.2-a")
	}
	return flags
}

// portableEnv overrides compiler flags and processor settings from the caller's environment and
// from `go env -w`. Go treats an empty variable as unset, so each has a value.
func portableEnv() []string {
	return []string{
		"CFLAGS=", "CXXFLAGS=", "CPPFLAGS=", "LDFLAGS=",
		"CGO_CFLAGS=-O2 -g", "CGO_CXXFLAGS=-O2 -g", "CGO_CPPFLAGS=-DCACHEPROXY_BUILD", "CGO_LDFLAGS=-O2 -g",
		"GOFLAGS=-mod=readonly", "GOWORK=off", "GOAMD64=v1", "GOARM64=v8.0",
	}
}

// host identifies what a probe depends on beside the programs: the processor, and the kernel, which
// permits the use of its instructions.
func host() string {
	return runtime.GOARCH + " " + processor() + " " + kernel()
}

// processor identifies the processor's instructions; "" if the system does not report them.
func processor() string {
	// x86 has flags, Arm has Features.
	return strings.TrimSpace(procField("/proc/cpuinfo", "model name") + " " + procField("/proc/cpuinfo", "flags") + procField("/proc/cpuinfo", "Features"))
}

// kernel returns the release of a Linux kernel; "" elsewhere.
func kernel() string {
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return strings.TrimSpace(string(release))
}

// procField returns the first value of a field in a file of "name: value" lines, without a unit of
// kB.
func procField(path, name string) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(content)) {
		if field, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(field) == name {
			return strings.TrimSuffix(strings.TrimSpace(value), " kB")
		}
	}
	return ""
}
