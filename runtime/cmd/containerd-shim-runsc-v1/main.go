// Command containerd-shim-runsc-v1 is gVisor's shim for containerd, from the same gVisor as both runtimes. Which of them it
// starts, and with which flags, the handler's file in /etc/kalium/containerd says. It adds no rules: runsc-kalium checks what
// a shim asks of it.
package main

import (
	containerd "github.com/containerd/containerd/runtime/v2/shim"

	"kalium.dev/kalium/runtime/internal/shim"
)

func main() {
	containerd.Run("io.containerd.runsc.v1", shim.New)
}
