package survey

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	runtimeCommand = "kalium.dev/kalium/runtime/cmd/runsc-kalium"
	gvisorModule   = "gvisor.dev/gvisor/"
)

// code is a package of gVisor that the runtime links: exactly the files that are compiled.
type code struct {
	path  string // without the module's name
	files []*ast.File
}

// linked parses what the runtime links of gVisor. It needs the go command, as tests have it.
func linked() ([]code, error) {
	list := exec.Command("go", "list", "-deps", "-json=ImportPath,Dir,GoFiles", runtimeCommand)
	list.Env = append(os.Environ(), "CGO_ENABLED=0")
	list.Stderr = os.Stderr
	output, err := list.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := list.Start(); err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var packages []code
	set := token.NewFileSet()
	for decoder := json.NewDecoder(output); decoder.More(); {
		var p struct {
			ImportPath, Dir string
			GoFiles         []string
		}
		if err := decoder.Decode(&p); err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		path, ours := strings.CutPrefix(p.ImportPath, gvisorModule)
		if !ours {
			continue
		}
		c := code{path: path}
		for _, name := range p.GoFiles {
			file, err := parser.ParseFile(set, filepath.Join(p.Dir, name), nil, parser.SkipObjectResolution)
			if err != nil {
				return nil, err
			}
			c.files = append(c.files, file)
		}
		packages = append(packages, c)
	}
	return packages, list.Wait()
}

// functions calls visit for every function and method with a body.
func (c *code) functions(visit func(*ast.FuncDecl)) {
	for _, file := range c.files {
		for _, declaration := range file.Decls {
			if f, ok := declaration.(*ast.FuncDecl); ok && f.Body != nil {
				visit(f)
			}
		}
	}
}

// variables calls visit for every declaration outside of functions.
func (c *code) variables(visit func(*ast.GenDecl)) {
	for _, file := range c.files {
		for _, declaration := range file.Decls {
			if d, ok := declaration.(*ast.GenDecl); ok {
				visit(d)
			}
		}
	}
}

// selected returns the name behind "linux." or "unix." in an expression, or "".
func selected(e ast.Expr) string {
	s, ok := e.(*ast.SelectorExpr)
	if !ok {
		return ""
	}
	if p, ok := s.X.(*ast.Ident); !ok || p.Name != "linux" && p.Name != "unix" {
		return ""
	}
	return s.Sel.Name
}

// cases lists the names of gVisor's Linux constants that a function compares with: in switches and by "==".
func cases(f *ast.FuncDecl) []string {
	var names []string
	add := func(e ast.Expr) {
		if name := selected(e); name != "" {
			names = append(names, name)
		}
	}
	ast.Inspect(f.Body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CaseClause:
			for _, e := range n.List {
				add(e)
			}
		case *ast.BinaryExpr:
			if n.Op == token.EQL {
				add(n.X)
				add(n.Y)
			}
		}
		return true
	})
	return names
}

// mentioned lists the names of gVisor's Linux constants with a prefix that a node mentions.
func mentioned(node ast.Node, prefix string) []string {
	var names []string
	ast.Inspect(node, func(n ast.Node) bool {
		if e, ok := n.(ast.Expr); ok {
			if name := selected(e); strings.HasPrefix(name, prefix) {
				names = append(names, name)
			}
		}
		return true
	})
	return names
}

// called returns the name of the function or method that an expression calls.
func called(call *ast.CallExpr) string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		return f.Name
	case *ast.SelectorExpr:
		return f.Sel.Name
	}
	return ""
}

// nameOf spells a function as gVisor's own stack traces do.
func nameOf(f *ast.FuncDecl) string {
	if f.Recv == nil || len(f.Recv.List) == 0 {
		return f.Name.Name
	}
	receiver := f.Recv.List[0].Type
	if star, ok := receiver.(*ast.StarExpr); ok {
		receiver = star.X
	}
	if id, ok := receiver.(*ast.Ident); ok {
		return id.Name + "." + f.Name.Name
	}
	return f.Name.Name
}
