package lab

import "fmt"

// Part is one of the processes of a Thaw that runs in several.
type Part struct {
	Name string
	*Process

	thaw *Thaw
	args []string
}

// Part returns the process of that name.
func (t *Thaw) Part(name string) *Part {
	for _, p := range t.parts {
		if p.Name == name {
			return p
		}
	}
	panic(fmt.Sprintf("thaw %s has no process %s", t.name, name))
}

// Launch starts the process and does not wait.
func (p *Part) Launch() (err error) {
	p.Process, err = p.thaw.lab.Start(Spec{Name: p.thaw.name + "-" + p.Name, Args: p.args, Env: p.thaw.env})
	if p == p.thaw.parts[len(p.thaw.parts)-1] {
		p.thaw.Process = p.Process
	}
	return err
}
