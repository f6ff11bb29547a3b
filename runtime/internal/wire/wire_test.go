package wire

import (
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
)

func TestARefusalIsPrintableAndBounded(t *testing.T) {
	for want, err := range map[policy.Reason]*Error{
		policy.ReasonMalformed:   Malformed("found %s", "\x1b[2J\xff"+strings.Repeat("x", 500)),
		policy.ReasonUnsupported: Unsupported("found %q", "\n"),
		policy.ReasonTooLarge:    TooLarge("%d bytes", 5),
	} {
		if err.Reason != want || len(err.Text) > textMax || policy.Printable(err.Text, textMax) != err.Text || !strings.HasPrefix(err.Error(), string(want)+": ") {
			t.Errorf("%s: %q", want, err.Error())
		}
	}
}
