module konnektor/bench/tunnel

go 1.24
