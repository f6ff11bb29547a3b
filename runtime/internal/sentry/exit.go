package sentry

import (
	"time"

	"gvisor.dev/gvisor/pkg/sentry/arch"
	"gvisor.dev/gvisor/pkg/sentry/kernel"

	"kalium.dev/kalium/runtime/internal/endpoint"
)

const (
	lingerMax  = 5 * time.Second      // for peers to take what the program had written when it ended
	lingerStep = 2 * time.Millisecond // between two looks
)

// exitCall is in front of exit(2) and exit_group(2). When the first process of the sandbox ends, gVisor ends the network
// stack with everything in it that is not sent. A kernel goes on sending; so do we, for a while.
func exitCall(group bool) wrapper {
	return func(original kernel.SyscallFn) kernel.SyscallFn {
		return func(t *kernel.Task, number uintptr, a arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
			if t.ThreadGroup() == t.Kernel().GlobalInit() && (group || t.ThreadGroup().Count() == 1) {
				linger(t)
			}
			return original(t, number, a)
		}
	}
}

func linger(t *kernel.Task) {
	endpoint.EndWriting()
	deadline := time.Now().Add(lingerMax)
	// Not an interruptible wait: the signals that Go's own scheduler sends would end it.
	for endpoint.Unsettled() > 0 && time.Now().Before(deadline) && !t.Killed() {
		time.Sleep(lingerStep)
	}
}
