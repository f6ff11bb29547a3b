// Command small is what images of a cluster need beside their program, by the name that it is called by: `pause`, which holds a pod's
// namespaces; `cp`, with which manifests install files on a node; and `flannel`, the CNI plugin that gives a pod an address of its node's
// network.
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	programs := map[string]func() error{"pause": pause, "cp": cp, "flannel": flannel}
	name := filepath.Base(os.Args[0])
	program, known := programs[name]
	if !known {
		fmt.Fprintf(os.Stderr, "%s: pause, cp and flannel are the names to call this by\n", name)
		os.Exit(2)
	}
	if err := program(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}
