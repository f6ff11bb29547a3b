package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
)

// cp is `cp [-f] FILE DESTINATION`. Who looks at the destination finds the old file or the new one, whole.
func cp() error {
	words := os.Args[1:]
	if len(words) > 0 && words[0] == "-f" {
		words = words[1:]
	}
	if len(words) != 2 {
		return errors.New("expected a file and its destination")
	}
	from, to := words[0], words[1]
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	about, err := source.Stat()
	if err != nil {
		return err
	}
	copied, err := os.CreateTemp(filepath.Dir(to), ".cp-*")
	if err != nil {
		return err
	}
	defer os.Remove(copied.Name()) // gone already when all went well
	if _, err := io.Copy(copied, source); err != nil {
		return err
	}
	if err := copied.Chmod(about.Mode()); err != nil {
		return err
	}
	if err := copied.Close(); err != nil {
		return err
	}
	return os.Rename(copied.Name(), to)
}
