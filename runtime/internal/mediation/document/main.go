// Command document writes docs/reference/mediation.md to standard output, or, with -unclassified, how much of the linked
// gVisor has no line in the table. What has none is named on standard error.
package main

import (
	"flag"
	"fmt"
	"os"

	"kalium.dev/kalium/runtime/internal/mediation"
	"kalium.dev/kalium/runtime/internal/mediation/survey"
)

func main() {
	unclassified := flag.Bool("unclassified", false, "print the number of things in the linked gVisor that have no line")
	flag.Parse()
	if !*unclassified {
		fmt.Print(mediation.Document())
		return
	}
	found, err := survey.Take()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	missing := found.Unclassified()
	for _, name := range missing {
		fmt.Fprintln(os.Stderr, name)
	}
	fmt.Println(len(missing))
}
