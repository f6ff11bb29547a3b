// Command runsc-stock is runsc of the same gVisor that runsc-kalium is built from, unchanged. Experiments compare the
// two, so that a difference between them is ours and not one of versions.
package main

import (
	"gvisor.dev/gvisor/runsc/cli/maincli"
	"gvisor.dev/gvisor/runsc/version"
)

func main() {
	// The linker's -X version.version=... takes effect only where the package is referred to.
	_ = version.Version()
	maincli.Main()
}
