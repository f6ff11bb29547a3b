// Command runsc-kalium is runsc whose internet sockets are guarded. gVisor is an ordinary dependency: neither a fork nor
// a patch.
package main

import (
	"os"

	"gvisor.dev/gvisor/runsc/cli/maincli"
	"gvisor.dev/gvisor/runsc/version"

	"kalium.dev/kalium/runtime/internal/sentry"
)

// refusedStatus is the exit status of runsc for commands that it did not carry out.
const refusedStatus = 128

func main() {
	// The linker's -X version.version=... takes effect only where the package is referred to.
	_ = version.Version()
	sentry.Register()
	err := sentry.Install()
	if err == nil {
		err = sentry.Examine(os.Args[1:])
	}
	if err != nil {
		sentry.Report(os.Args[1:], err)
		os.Exit(refusedStatus)
	}
	maincli.Main()
}
