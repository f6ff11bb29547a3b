// Command containerd-shim-runsc-v1 is gVisor's shim for containerd, unchanged and from the same gVisor as both runtimes. Which of
// them it starts, and with which flags, the runtime's file in /etc/kalium/containerd says. It adds no rules: runsc-kalium
// checks what a shim asks of it.
package main

import "gvisor.dev/gvisor/shim/v1/cli"

func main() {
	cli.Main()
}
