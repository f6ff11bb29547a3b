package agent

import (
	"bytes"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// exposition is Prometheus's text format, version 0.0.4, as far as the agent needs it: counters, gauges and histograms.
// The official client would bring eight modules into a daemon of root's and 6.8 MB into its 8.5 MB;
// tests/unit/test_dashboards.py reads what this writes with the parser of Prometheus's own Python client.
type exposition struct{ bytes.Buffer }

const expositionType = "text/plain; version=0.0.4; charset=utf-8"

const (
	counter   = "counter"
	gauge     = "gauge"
	histogram = "histogram"
)

// label is one name and value of a sample.
type label struct{ name, value string }

// family begins a metric; its samples follow.
func (e *exposition) family(name, kind, help string) {
	e.WriteString("# HELP " + name + " " + help + "\n# TYPE " + name + " " + kind + "\n")
}

var escaped = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

func (e *exposition) sample(name string, value float64, labels ...label) {
	e.WriteString(name)
	for i, each := range labels {
		e.WriteByte("{,"[min(i, 1)])
		e.WriteString(each.name + `="` + escaped.Replace(each.value) + `"`)
	}
	if len(labels) > 0 {
		e.WriteByte('}')
	}
	e.WriteByte(' ')
	e.WriteString(number(value))
	e.WriteByte('\n')
}

func number(value float64) string {
	if math.IsInf(value, 1) {
		return "+Inf"
	}
	return strconv.FormatFloat(value, 'g', -1, 64)
}

// single is a metric without labels.
func (e *exposition) single(name, kind, help string, value float64) {
	e.family(name, kind, help)
	e.sample(name, value)
}

// spanBounds are the upper bounds of the agent's histograms: from what a question takes on loopback to its deadline.
var spanBounds = [...]time.Duration{
	25 * time.Microsecond, 50 * time.Microsecond, 100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond, time.Millisecond,
	2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond,
	250 * time.Millisecond, time.Second,
}

// spans is a histogram that many goroutines may add to.
type spans struct {
	counts [len(spanBounds) + 1]atomic.Uint64 // the last one: beyond every bound
	sumNS  atomic.Int64
}

func (s *spans) add(span time.Duration) {
	at, _ := slices.BinarySearch(spanBounds[:], span)
	s.counts[at].Add(1)
	s.sumNS.Add(int64(span))
}

// histogram writes s as one series of the metric name, which family has begun.
func (e *exposition) histogram(name string, s *spans, labels ...label) {
	total := uint64(0)
	for i := range s.counts {
		bound := math.Inf(1)
		if i < len(spanBounds) {
			bound = spanBounds[i].Seconds()
		}
		total += s.counts[i].Load()
		e.sample(name+"_bucket", float64(total), append(slices.Clone(labels), label{"le", number(bound)})...)
	}
	e.sample(name+"_sum", time.Duration(s.sumNS.Load()).Seconds(), labels...)
	e.sample(name+"_count", float64(total), labels...)
}
