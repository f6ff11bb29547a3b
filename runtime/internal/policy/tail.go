package policy

// StepTailInto is StepTail as StepInto is Step.
func (f *Function) StepTailInto(dst, c Cursor, m *Message) (Verdict, Cursor) {
	return f.step(dst, c, m, true)
}

// TailAt tells whether anything may be sent after an answer that was given at c.
func (f *Function) TailAt(c Cursor) bool {
	if f == nil {
		return false
	}
	for _, state := range c.States() {
		if state >= f.States {
			return false
		}
		for _, e := range f.edges[f.first[state]:f.first[state+1]] {
			if f.Symbols[e.symbol].Tail {
				return true
			}
		}
	}
	return false
}
